"""Sixteen planted defects, each named by the audit, and twelve sound set-ups in which it finds nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch
import torch._dynamo
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna_integration import PyTorchLightningPruningCallback
from torch import Tensor, nn

from lightning_bge.advisor.audit.audit import AuditConfig, audit
from lightning_bge.advisor.audit.checks_compute import Row
from lightning_bge.advisor.audit.checks_search import objective_rows, pruner_row, search_rows
from lightning_bge.advisor.audit.requested import Claims
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.peft_and_freezing import SaversConfig
from tests.helpers.foreign_modules import Accumulating, Classifier, loader
from tests.helpers.small_search import small_data, write_files

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

WATCH = AuditConfig(rounds=0)
CPU: dict[str, Any] = {"accelerator": "cpu"}


@pytest.fixture(autouse=True)
def few_words() -> Iterator[None]:
    """Lightning advises more workers, and a lower log interval, for every loader as small as these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*in eval mode.*|.*persistent_workers=True.*")
        yield
    torch._dynamo.reset()


def named(module: L.LightningModule, row: str, data: Any = None, claims: Claims | None = None, **trainer: Any) -> str:
    """Audit, expect the row to be named, and return its words."""
    found = audit(module, loader() if data is None else data, {**CPU, **trainer}, claims, WATCH)
    wrong = {one.name: one for one in found.alarms}
    assert row in wrong, found.row(row)
    return f"{wrong[row].in_effect}; {wrong[row].evidence}; {wrong[row].advice}"


# ---------------------------------------------------------------------- precision


class Island(Classifier):
    """Its encoder runs in a region where autocast is off."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().loss(batch)


class OwnProduct(torch.autograd.Function):
    """A custom function, whose inputs autocast does not touch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.float() @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.float().flatten(0, -2).T @ grad.flatten(0, -2)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return OwnProduct.apply(x, self.weight.T) + self.bias


def test_bf16_asked_but_a_region_with_autocast_off_multiplies() -> None:
    assert "fp32" in named(Island(), "bf16 matrix products", precision="bf16-mixed")


def test_bf16_asked_but_custom_layers_multiply_in_fp32() -> None:
    module = Classifier()
    for layer in module.net.bert.encoder.layer:
        for owner, name in ((layer.intermediate, "dense"), (layer.output, "dense")):
            getattr(owner, name).__class__ = OwnLinear
    assert "fp32" in named(module, "bf16 matrix products", precision="bf16-mixed")


@pytest.mark.gpu
def test_tf32_off_by_swapped_arguments() -> None:
    def set_up(cudnn_benchmark: bool, tf32: bool) -> None:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    set_up(True, False)  # meant the other way round
    found = audit(Classifier(tf32=True), loader(), {"accelerator": "cuda"}, config=WATCH)
    assert "TF32" in {row.name for row in found.alarms}


@pytest.mark.gpu
def test_tf32_off_as_nobody_sets_it() -> None:
    torch.set_float32_matmul_precision("highest")
    found = audit(Classifier(), loader(), {"accelerator": "cuda"}, Claims(tf32=True), WATCH)
    assert "TF32" in {row.name for row in found.alarms}


# ---------------------------------------------------------------------- torch.compile


class Ignoring(Classifier):
    """Its setting is read, passed on, and forgotten."""

    def configure_model(self) -> None:
        if self.hparams.use_torch_compile:
            torch.compile(self.net, backend="eager")


class Plain(nn.Module):
    """A layer that torch.compile is glad to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(32, 32)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return torch.relu(self.weight(x)) * factor


class OverPlain(L.LightningModule):
    """A stack of `Plain`, all of its matrix products in them; shapes or numbers that change at each step, if asked."""

    def __init__(self, compiling: str = "each", shapes: bool = False, numbers: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plain() for _ in range(2)])
        self.shapes, self.numbers, self.calls = shapes, numbers, 0
        if compiling == "sequential":
            self.stack = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
            self.layers = nn.ModuleList()
            self.stack.compile(backend="eager")
        else:
            for layer in self.layers:
                layer.compile(backend="eager", dynamic=False if shapes else None)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        x = batch[:, : 3 + self.calls] if self.shapes else batch
        if not len(self.layers):
            return self.stack(x).sum()
        for layer in self.layers:
            x = layer(x, 1.0 + 0.1 * self.calls) if self.numbers else layer(x)
        return x.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def numbers_loader() -> Any:
    return torch.utils.data.DataLoader(torch.randn(96, 40, 32), batch_size=8)


def test_compile_asked_and_ignored() -> None:
    assert "nothing was given" in named(Ignoring(use_torch_compile=True), "torch.compile")


def test_compile_asked_of_a_module_that_torch_skips() -> None:
    assert "skips" in named(OverPlain("sequential"), "torch.compile", numbers_loader())


def test_compile_recompiles_every_step_for_new_shapes() -> None:
    with torch._dynamo.config.patch(recompile_limit=64):
        assert "anew in batch after batch" in named(OverPlain(shapes=True), "torch.compile", numbers_loader())


def test_compile_recompiles_every_step_for_new_numbers() -> None:
    with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
        assert "anew in batch after batch" in named(OverPlain(numbers=True), "torch.compile", numbers_loader())


def test_compile_silently_eager_after_the_limit_within_the_run() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        assert "given up" in named(OverPlain(shapes=True), "torch.compile", numbers_loader())


def test_compile_silently_eager_as_the_limit_was_reached_before() -> None:
    module = OverPlain()
    with torch._dynamo.config.patch(recompile_limit=1):
        for layer in module.layers:  # an evaluation came first
            with torch.no_grad():
                layer(torch.randn(2, 5, 32))
        assert "given up" in named(module, "torch.compile", numbers_loader())


# ---------------------------------------------------------------------- optimizer, attention, dropout


def test_fused_asked_but_foreach_runs() -> None:
    assert "foreach" in named(Classifier(fused=False, fused_adamw=True), "fused optimizer")


class Restored(Classifier):
    """Its optimizer takes over the state, and with it the flags, of an older run."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        state = torch.optim.AdamW(self.parameters(), foreach=True).state_dict()
        optimizer.load_state_dict(state)
        return optimizer


def test_fused_lost_with_a_restored_state() -> None:
    assert "foreach" in named(Restored(), "fused optimizer")


def test_eager_attention_of_transformers() -> None:
    assert "eager" in named(Classifier(attention="eager"), "attention kernel")


class ByHand(Classifier):
    """Its model is set to SDPA, but somebody has written attention out in a layer on top."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        heads = hidden.unflatten(-1, (2, 16)).transpose(1, 2)
        mixed = (heads @ heads.transpose(2, 3)).softmax(-1) @ heads
        logits = self.net.classifier(mixed.transpose(1, 2).flatten(2)[:, 0])
        return nn.functional.cross_entropy(logits, batch["labels"])


def test_eager_attention_by_hand() -> None:
    assert "eager" in named(ByHand(), "attention kernel")


def test_dropout_silently_off_after_from_pretrained() -> None:
    module = Classifier()
    module.net.eval()
    assert "in eval mode" in named(module, "dropout")


class Asleep(Classifier):
    """Calls `eval` for its metrics and never comes back."""

    def on_train_start(self) -> None:
        self.net.bert.eval()


def test_dropout_silently_off_in_the_encoder_alone() -> None:
    assert "in eval mode" in named(Asleep(), "dropout")


# ---------------------------------------------------------------------- batches


def test_all_texts_padded_to_512() -> None:
    assert "padded to 512" in named(Classifier(), "padding", loader(width=512))


class Padding512(Classifier):
    """Pads on the device, where no loader shows it."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        wide = {k: nn.functional.pad(v, (0, 512 - v.shape[1])) if v.ndim == 2 else v for k, v in batch.items()}
        return super().loss(wide)


def test_all_texts_padded_to_512_within_the_module() -> None:
    assert "tokens computed" in named(Padding512(), "padding")


def test_effective_batch_of_57_by_rounding_down() -> None:
    target, physical = 64, 19
    words = named(
        Classifier(effective_batch_size=target),
        "effective batch",
        loader(physical, rows=190),
        accumulate_grad_batches=target // physical,
    )
    assert "57 rows" in words


def test_effective_batch_of_57_by_hand() -> None:
    module = Accumulating(every=64 // 19)
    assert "57 rows" in named(module, "effective batch", loader(19, rows=190), Claims(effective_batch=64))


class Dropping(Accumulating):
    """Steps full windows only."""

    def ends(self, batch_idx: int) -> bool:
        return False


def test_last_window_neither_stepped_nor_cleared() -> None:
    assert "behind the last optimizer step" in named(Dropping(every=3), "last window of an epoch", loader(8, rows=80))


def test_last_rows_dropped_by_the_loader() -> None:
    words = named(Classifier(), "last window of an epoch", loader(8, rows=93, drop_last=True))
    assert "drops the last 5 rows" in words


# ---------------------------------------------------------------------- the loop


class Item(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.history = [loss.item()]
        return loss


def test_item_every_step() -> None:
    assert "training_step" in named(Item(), "synchronisations")


class Branch(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0 if loss > 100 else loss


def test_a_branch_on_a_value_every_step() -> None:
    assert "training_step" in named(Branch(), "synchronisations")


def test_workers_restarted_every_epoch() -> None:
    assert "0 of 2" in named(Classifier(), "persistent workers", loader(num_workers=2))


class OwnLoader(Classifier):
    def train_dataloader(self) -> Any:
        return loader(num_workers=1)


def test_workers_of_a_modules_own_loader_restarted() -> None:
    found = audit(OwnLoader(), None, CPU, config=WATCH)
    assert "persistent workers" in {row.name for row in found.alarms}


@pytest.mark.gpu
def test_batches_not_pinned() -> None:
    found = audit(Classifier(), loader(), {"accelerator": "cuda"}, config=WATCH)
    assert "pinned memory" in {row.name for row in found.alarms}


class Holder:
    """A batch class of somebody's own, which `pin_memory` passes by."""

    def __init__(self, content: dict[str, Tensor]) -> None:
        self.content = content

    def values(self) -> Any:
        return self.content.values()

    def to(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        return {name: tensor.to(*args, **options) for name, tensor in self.content.items()}


@pytest.mark.gpu
def test_batches_of_an_own_class_are_not_pinned() -> None:
    data = loader(pin_memory=True)
    inner = data.collate_fn
    data.collate_fn = lambda rows: Holder(inner(rows))
    found = audit(Classifier(), data, {"accelerator": "cuda"}, config=WATCH)
    assert "pinned memory" in {row.name for row in found.alarms}


# ---------------------------------------------------------------------- the search


def folds_objective(folds: int, epochs: int, report: str) -> Any:
    """Somebody's objective over folds with his own LightningModule and Optuna's own callback, or ours."""

    def objective(trial: optuna.Trial) -> float:
        scores: list[float] = []
        for fold in range(folds):
            callbacks: list[L.Callback] = []
            if report == "optuna":
                callbacks = [PyTorchLightningPruningCallback(trial, "val_score")]
            elif report == "ours":
                callbacks = [FoldPruningCallback(trial, "val_score", fold, folds, epochs, scores)]
            trainer = L.Trainer(
                max_epochs=epochs,
                callbacks=callbacks,
                accelerator="cpu",
                limit_train_batches=1,
                **dict.fromkeys(
                    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
                ),
            )
            trainer.fit(Scored(), loader(rows=8), loader(rows=8))
            if report == "ours":
                scores.append(callbacks[0].close_fold())  # type: ignore[attr-defined]
            else:
                scores.append(float(trainer.callback_metrics["val_score"]))
        if report == "end":
            trial.report(sum(scores), 0)
            trial.should_prune()
        return sum(scores) / folds

    return objective


class Scored(Classifier):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_score", -self.loss(batch), batch_size=8)


def search_alarms(objective: Any, pruner: Any, folds: int) -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        rows = objective_rows(objective, pruner, trials=94, folds=folds)
    return {row.name: row for row in rows if row.verdict in ("lie", "off")}


def test_a_pruner_that_can_never_fire_in_our_settings() -> None:
    row = pruner_row(StudyConfig(n_trials=94, pruner=PrunerConfig("hyperband")), Steps(1, 1))
    assert row.verdict == "lie"
    assert "could never prune" in row.evidence


def test_a_pruner_that_can_never_fire_on_one_report_at_the_end() -> None:
    wrong = search_alarms(folds_objective(2, 1, "end"), HyperbandPruner(1, 5, 4), 2)
    assert wrong["pruning"].in_effect == "never"
    assert "1 steps" in wrong["pruning"].evidence


def test_only_the_first_of_five_folds_reports() -> None:
    wrong = search_alarms(folds_objective(5, 2, "optuna"), MedianPruner(), 5)
    assert list(wrong) == ["fold-level pruning"]
    assert "8 ignored" in wrong["fold-level pruning"].evidence


def test_only_the_last_value_of_the_folds_reports() -> None:
    assert "fold-level pruning" in search_alarms(folds_objective(3, 1, "end"), MedianPruner(), 3)


def test_a_sound_objective_raises_no_alarm() -> None:
    assert not search_alarms(folds_objective(3, 2, "ours"), MedianPruner(n_startup_trials=2), 3)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_our_pruners_raise_no_alarm(name: Any) -> None:
    rows = search_rows(StudyConfig(n_trials=60, pruner=PrunerConfig(name)), Steps(3, 4))
    assert not [row for row in rows if row.verdict in ("lie", "off")]


# ---------------------------------------------------------------------- sound set-ups


def compiled_classifier() -> Classifier:
    module = Classifier()
    for layer in module.net.bert.encoder.layer:
        layer.compile(backend="eager", dynamic=True)
    return module


class Regression(L.LightningModule):
    """No transformer, no mask, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def regression_loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(96, 8), torch.randn(96, 1)), 8)


FOREIGN: dict[str, Any] = {
    "as it is": (Classifier, loader, {}, None),
    "accumulation of two batches": (Classifier, loader, {"accumulate_grad_batches": 2}, Claims(effective_batch=16)),
    "manual, windows of three": (lambda: Accumulating(3), lambda: loader(8, rows=80), {}, Claims(effective_batch=24)),
    # a step takes longer than a worker needs for a batch, however busy the machine is
    "persistent workers": (
        lambda: Classifier(width=768),
        lambda: loader(num_workers=1, persistent_workers=True),
        {},
        None,
    ),
    "no dropout": (lambda: Classifier(dropout=0.0), loader, {}, None),
    "compiled layers": (compiled_classifier, loader, {}, Claims(compile=True)),
    "bf16": (Classifier, loader, {"precision": "bf16-mixed", "gradient_clip_val": None}, None),
    "a plain network": (Regression, regression_loader, {}, None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_no_false_alarm_in_a_foreign_project(name: str) -> None:
    make_module, make_loader, trainer, claims = FOREIGN[name]
    found = audit(make_module(), make_loader(), {**CPU, **trainer}, claims, WATCH)
    assert not found.alarms


OURS: dict[str, Any] = {
    "packed": ({}, {}, {}),
    "padded": ({"attention": "padded"}, {}, {}),
    "small micro-batches, bf16": ({}, {"max_tokens": 48}, {"precision": "bf16-mixed"}),
    "frozen layers": ({"savers": SaversConfig(frozen_layers=1)}, {}, {}),
}


@pytest.mark.parametrize("name", OURS)
def test_no_false_alarm_in_our_own(name: str, tmp_path: Path) -> None:
    options, batching, trainer = OURS[name]
    folder = write_files(tmp_path)
    rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([*rows, *rows[1:], *rows[1:]]) + "\n")
    data = small_data(folder, batching=BatchingConfig(**batching))
    model = BGEClassifier(str(folder / "model"), **options)
    found = audit(model, data, {**CPU, **trainer}, Claims(effective_batch=8), WATCH)
    assert not found.alarms
    assert found.row("effective batch").claimed == "8 rows"
