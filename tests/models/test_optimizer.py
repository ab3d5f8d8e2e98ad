from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from transformers import get_scheduler

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    parameter_groups,
)
from lightning_bge.types import Batch, Schema
from tests.helpers.rates import rates_of
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model, small_model

STEPS = 4  # of an epoch


def by_name(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Name -> the group that the parameter is in."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            assert names[parameter] not in found, "in two groups"
            found[names[parameter]] = group
    return found


def is_norm_or_bias(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return name.endswith("bias") or isinstance(owner, nn.LayerNorm)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "deberta-v2"])
def test_every_parameter_once_and_no_decay_on_norms_and_biases(kind: str) -> None:
    model = small_model(kind)
    groups = by_name(model, OptimizerConfig(lr=0.1, weight_decay=0.02))
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        name: 0.0 if is_norm_or_bias(model, name) else 0.02 for name in groups
    }
    assert {group["lr"] for group in groups.values()} == {0.1}


def test_frozen_parameters_are_left_out() -> None:
    model = small_model("bert")
    model.bert.embeddings.requires_grad_(False)
    groups = by_name(model, OptimizerConfig())
    assert not any("embeddings" in name for name in groups)
    assert "classifier.weight" in groups


def test_adamw_is_fused_and_has_the_configured_values() -> None:
    config = OptimizerConfig(lr=0.3, weight_decay=0.2, beta1=0.8, beta2=0.95, eps=1e-7)
    optimizer = build_optimizer(small_model("bert"), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["fused"] is True
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-7)


LAYER_RATES = {
    "bert": {
        "classifier.weight": 0,
        "bert.pooler.dense.weight": 0,
        "bert.encoder.layer.1.output.LayerNorm.bias": 1,
        "bert.encoder.layer.0.attention.self.query.weight": 2,
        "bert.embeddings.word_embeddings.weight": 3,
        "bert.embeddings.LayerNorm.weight": 3,
    },
    "xlm-roberta": {
        "classifier.dense.weight": 0,
        "classifier.out_proj.bias": 0,
        "roberta.encoder.layer.1.attention.self.key.bias": 1,
        "roberta.encoder.layer.0.output.dense.weight": 2,
        "roberta.embeddings.position_embeddings.weight": 3,
    },
    "modernbert": {
        "classifier.weight": 0,
        "head.dense.weight": 0,
        "model.final_norm.weight": 0,
        "model.layers.3.attn.Wqkv.weight": 1,
        "model.layers.0.mlp.Wi.weight": 4,
        "model.embeddings.tok_embeddings.weight": 5,
    },
}


@pytest.mark.parametrize("kind", LAYER_RATES)
def test_layer_decay_lowers_the_rate_layer_by_layer(kind: str) -> None:
    groups = by_name(small_model(kind), OptimizerConfig(lr=1.0, layer_decay=0.5))
    assert {name: groups[name]["lr"] for name in LAYER_RATES[kind]} == {
        name: 0.5**above for name, above in LAYER_RATES[kind].items()
    }


# ------------------------------------------------------------------ schedules, over real runs


class Rates(Callback):
    """The learning rate that each optimizer step is made with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1))


def batches() -> list[Batch]:
    """An epoch's effective batches; each is cut into 3, which must not count as steps."""
    sequences = random_sequences((9, 7, 5), vocabulary=45)
    return [cut_batch(sequences, torch.tensor([0.0, 1.0, 1.0]), 3) for _ in range(STEPS)]


def rates_of_a_run(folder: Path, schedule: ScheduleConfig, **trainer: Any) -> list[float]:
    module = BGEClassifier(str(folder), optimizer=OptimizerConfig(lr=0.01), schedule=schedule)
    rates = Rates()
    runner = quiet_trainer(callbacks=[rates], limit_val_batches=0, **trainer)
    runner.fit(module, datamodule=Batches(Schema("binary", ("no", "yes"), ("text",), 32), batches()))
    assert runner.global_step == len(rates.rates)
    return rates.rates


def expected_rates(name: str, warmup: int, total: int, steps: int, **specific: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=specific)
    return rates_of(optimizer, scheduler, steps)


@pytest.mark.parametrize(
    ("schedule", "name", "warmup", "specific"),
    [
        (ScheduleConfig(), "linear", 1, {}),
        (ScheduleConfig("linear", warmup=0.25), "linear", 3, {}),
        (ScheduleConfig("linear", warmup=2), "linear", 2, {}),
        (ScheduleConfig("cosine", warmup=0.0), "cosine", 0, {}),
        (ScheduleConfig("cosine_with_restarts", cycles=2), "cosine_with_restarts", 1, {"num_cycles": 2}),
        (ScheduleConfig("constant", warmup=3), "constant_with_warmup", 3, {}),
    ],
    ids=lambda value: value.name if isinstance(value, ScheduleConfig) else "",
)
def test_schedule_counts_optimizer_steps(
    folder: Path, schedule: ScheduleConfig, name: str, warmup: int, specific: dict[str, Any]
) -> None:
    found = rates_of_a_run(folder, schedule, max_epochs=3)
    assert found == pytest.approx(expected_rates(name, warmup, 3 * STEPS, 3 * STEPS, **specific), abs=1e-12)


def test_schedule_can_be_laid_out_for_a_longer_run(folder: Path) -> None:
    found = rates_of_a_run(folder, ScheduleConfig("cosine", epochs=5), max_epochs=2)
    assert found == pytest.approx(expected_rates("cosine", 2, 5 * STEPS, 2 * STEPS), abs=1e-12)
    assert found == rates_of_a_run(folder, ScheduleConfig("cosine"), max_epochs=5)[: 2 * STEPS]


def test_schedule_ends_with_max_steps(folder: Path) -> None:
    found = rates_of_a_run(folder, ScheduleConfig(), max_steps=6, max_epochs=-1)
    assert found == pytest.approx(expected_rates("linear", 1, 6, 6), abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("lr", -1e-5), ("layer_decay", 0.0), ("layer_decay", 1.1), ("max_grad_norm", 0.0)]
)
def test_optimizer_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.optimizer\.{field}: expected .*, got {value}"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("warmup", -0.1), ("cycles", 0)])
def test_schedule_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.schedule\.{field}: expected .*, got {value}"):
        ScheduleConfig(**{field: value})


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.schedule.name: expected one of linear, cosine, .*, got foo"):
        ScheduleConfig(name="foo")  # type: ignore[arg-type]


def test_a_warm_up_that_never_ends_is_named(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    build_schedule(optimizer, ScheduleConfig(warmup=9), 10)
    assert not caplog.records
    build_schedule(optimizer, ScheduleConfig(warmup=10), 10)
    [record] = caplog.records
    assert record.message.startswith("model.schedule.warmup: 10 steps of warm-up, and 10 in all")
