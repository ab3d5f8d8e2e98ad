"""Training in fp16: on a CPU, with the precision plugin that Lightning makes for a GPU."""

from __future__ import annotations

import copy
import functools
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.errors import ConfigError, UserError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.loss_scaling import steps_made
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.runtime.compat.torch import takes_found_inf, with_found_inf
from lightning_bge.runtime.memory import Limit
from lightning_bge.types import Batch, Schema
from tests.helpers.rank_processes import run_ranks
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model
from tests.helpers.trial_steps import ALL, FakeMeter

BINARY = Schema("binary", ("no", "yes"), ("a",), 32)
LENGTHS = (11, 9, 7, 5, 4, 4, 3)
LABELS = torch.tensor([1.0, 0, 1, 0, 1, 1, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def fp16(scale: float = 2.0**16, **options: Any) -> MixedPrecision:
    """The plugin; Lightning makes none for fp16 on a CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=scale, **options))


def batches(steps: int, pieces: int = 2) -> list[Batch]:
    return [cut_batch(random_sequences(LENGTHS, 45, number % 5), LABELS, pieces) for number in range(steps)]


class Record(Callback):
    """The loss of each step, the scale after it, and the gradients before it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(pl_module._losses[-1]))
        self.scales.append(trainer.precision_plugin.state_dict().get("scale", 1.0))


class Planted(BGEClassifier):
    """Has gradients that are not finite in some steps, of one micro-batch each.

    Args:
        steps: numbers of the steps.
        value: of one gradient.
    """

    def __init__(self, *args: Any, steps: tuple[int, ...] = (), value: float = torch.inf, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps, self.value = steps, value

    def on_after_backward(self) -> None:
        if self.global_step in self.steps:
            bias = next(p for name, p in self.named_parameters() if name.endswith("classifier.bias"))
            assert bias.grad is not None
            bias.grad += self.value


def fit(
    module: BGEClassifier, data: list[Batch], plugin: MixedPrecision | None, *callbacks: Any, **more: Any
) -> Trainer:
    trainer = quiet_trainer(plugins=plugin, limit_val_batches=0, callbacks=list(callbacks), **more)
    trainer.fit(module, datamodule=Batches(BINARY, data), weights_only=True if "ckpt_path" in more else None)
    return trainer


def make(folder: str, lr: float = 1e-3, clip: float | None = 1.0, **options: Any) -> Planted:
    return Planted(folder, optimizer=OptimizerConfig(lr=lr, max_grad_norm=clip), **options)


def weights(module: BGEClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_fifty_losses_are_those_of_fp32(folder: str, attention: Any) -> None:
    found = []
    for plugin in (None, fp16()):
        record = Record()
        fit(make(folder, attention=attention), batches(50), plugin, record)
        found.append(torch.tensor(record.losses))
    assert found[0][-5:].mean() < 0.8 * found[0][:5].mean()  # it learns
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_gradients_do_not_depend_on_the_cut(folder: str) -> None:
    found = []
    for pieces, plugin in ((1, None), (1, fp16()), (3, fp16()), (7, fp16())):
        record = Record()
        fit(make(folder, clip=None), batches(1, pieces), plugin, record)
        found.append(torch.cat([value.flatten() for value in record.gradients[0].values()]))
    exact = found.pop(0)
    for gradient in found:  # fp16 has 11 bits
        assert (gradient - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_with_gradients_that_are_not_finite_is_skipped(
    folder: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            states.append((weights(pl_module), state, rate, trainer.global_step))

    record = Record()
    caplog.set_level(logging.INFO, "lightning_bge")
    trainer = fit(make(folder, steps=(2,), value=value, schedule=ScheduleConfig(warmup=0.0)), batches(5), fp16(1024.0),
                  record, Keep())  # fmt: skip
    before, skipped, after = states[1:4]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in skipped[0].items())
    for number, state in skipped[1].items():
        assert all(torch.equal(tensor, before[1][number][name]) for name, tensor in state.items())
    assert any(not torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert record.scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert [state[3] for state in states] == [1, 2, 3, 4, 5]  # the step counts
    assert before[2] > skipped[2] > after[2]  # for the schedule too
    assert float(steps_made(trainer.optimizers[0])) == 4
    assert "16-mixed: 1 of 5 steps were skipped, as gradients were too large for fp16; the loss scale is now 512" in (
        caplog.messages
    )
    assert trainer.callback_metrics["train_skipped_steps"] == 1
    assert trainer.callback_metrics["train_loss_scale"] == 512


def test_steps_are_those_of_a_plain_loop_that_unscales_before_it_clips(folder: str) -> None:
    """Most steps are clipped, and the first ones are skipped."""
    data, module = batches(12, 3), make(folder, clip=0.5, schedule=ScheduleConfig("constant", warmup=0.0))
    record = Record()
    trainer = fit(module, data, fp16(2.0**22), record)

    other = make(folder)
    other.set_schema(BINARY)
    other.configure_model()
    assert other.net is not None
    assert other.loss is not None
    scaler, optimizer = GradScaler("cpu", init_scale=2.0**22), None
    norms, net = [], other.net.train()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-3, fused=True)
    for batch in data:
        for micro in batch.micro:
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = other.loss(net(micro), micro.labels) / len(LABELS)
                scaler.scale(loss).backward()  # within, as a Lightning module's training step is
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=True)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    finite = [norm for norm in norms if norm < torch.inf]
    assert 4 <= len(finite) < 12
    assert sum(norm > 0.5 for norm in finite) >= 3
    assert record.scales[-1] == scaler.get_scale()
    assert float(steps_made(trainer.optimizers[0])) == len(finite)
    for name, value in net.state_dict().items():
        assert torch.equal(module.net.state_dict()[name], value), name  # type: ignore[union-attr]


def test_a_resumed_run_continues_with_its_scale(folder: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(scale: float, callbacks: list[Callback], **options: Any) -> tuple[Trainer, dict[str, Tensor]]:
        module, plugin = make(folder, steps=(1, 4), dropout=0.1), fp16(scale, growth_interval=2)
        trainer = quiet_trainer(plugins=plugin, limit_val_batches=0, callbacks=callbacks, max_epochs=2)
        trainer.fit(module, datamodule=Batches(BINARY, batches(3)), **options)
        return trainer, weights(module)

    whole, expected = run(64.0, [Save()])
    state = whole.precision_plugin.state_dict()
    assert state["scale"] == 32.0  # halved, doubled after steps 2 and 3, halved
    resumed, found = run(4096.0, [], ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    assert resumed.precision_plugin.state_dict() == state
    assert resumed.global_step == 6
    assert resumed.callback_metrics["train_skipped_steps"] == 1  # of this epoch
    assert float(steps_made(resumed.optimizers[0])) == 4
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_an_optimizer_step_that_ran_out_of_memory_is_repeated_on_the_same_gradients(folder: str) -> None:
    """Also after a skipped step, which the trainer counts and the optimizer does not."""

    class Fail(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2 and not pl_module.oom_retry.records:
                raise MemoryError

    found, gradients = [], []
    for callbacks in ([], [Fail()]):
        module, record = make(folder, steps=(1,)), Record()
        fit(module, batches(4), fp16(), record, *callbacks)
        found.append(weights(module))
        gradients.append(record.gradients)
    assert [one.where for one in module.oom_retry.records] == ["optimizer"]
    assert len(gradients[1]) == len(gradients[0]) + 1
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_step_that_ran_out_of_memory_after_a_weight_has_changed_ends_the_run(folder: str) -> None:
    """A step was skipped before, so that the optimizer's count is that of the trainer again."""

    class Module(Planted):
        def configure_optimizers(self) -> Any:
            [optimizer], schedules = super().configure_optimizers()
            step, calls = optimizer.step, []

            @functools.wraps(step)
            def fails(*args: Any, **options: Any) -> None:
                step(*args, **options)
                calls.append(1)
                if len(calls) == 3:
                    raise MemoryError

            optimizer.step = fails
            return [optimizer], schedules

    module = Module(folder, steps=(1,))
    with pytest.raises(UserError, match="continue from the last checkpoint"):
        fit(module, batches(4), fp16())


def test_a_run_whose_loss_is_not_finite_ends(folder: str) -> None:
    module = make(folder, steps=tuple(range(100)), value=torch.nan)
    with pytest.raises(UserError, match=r"the loss scale fell to 0\.5.*Lower model\.optimizer\.lr"):
        fit(module, batches(40), fp16(), log_every_n_steps=17)
    assert module.global_step == 17
    with pytest.raises(UserError, match=r"the loss scale fell to"):
        fit(module, batches(20), fp16(8.0))  # at the end of the epoch


def test_what_would_not_be_scaled_well_is_refused(folder: str) -> None:
    class Module(BGEClassifier):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match=r"needs an optimizer whose step takes `found_inf`.*got SGD"):
        fit(Module(folder), batches(1), fp16())
    with pytest.raises(ConfigError, match="without an enabled GradScaler"):
        fit(make(folder), batches(1), fp16(enabled=False))
    with pytest.raises(ConfigError, match=r"got 16-true.*Set 16-mixed"):
        quiet_trainer(precision="16-true").fit(make(folder), datamodule=Batches(BINARY, batches(1)))


class Plain(Optimizer):
    """Knows nothing of scalers."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def test_an_optimizer_that_is_told_skips_its_steps() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = with_found_inf(Plain)([weight], lr=1.0), GradScaler("cpu", init_scale=4.0)
    assert (type(optimizer).__name__, isinstance(optimizer, Plain)) == ("Plain", True)
    assert takes_found_inf(optimizer)
    assert not takes_found_inf(Plain([weight], lr=1.0))
    for value in (0.25, torch.inf, 0.25):
        scaler.scale((weight * value).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert weight.tolist() == [0.5] * 3
    assert scaler.get_scale() == 2.0
    (weight * 0.25).sum().backward()
    optimizer.step()  # without a scaler
    assert weight.tolist() == [0.25] * 3


def test_trial_steps_leave_the_scale_as_it_was(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    class Data(Batches):
        micro_batch_size, made = 8, list[int]()

        def worst_case_batch(self, size: int, train: bool) -> Batch:
            self.made.append(size)
            return cut_batch(random_sequences((8,) * (size // 8), 45), torch.ones(size // 8), 1)

        def set_micro_batch_size(self, size: int) -> None:
            calls.append(size)

    name = "lightning_bge.callbacks.micro_batch.finder"
    monkeypatch.setattr(f"{name}.make_meter", lambda *_, **__: FakeMeter(data))  # type: ignore[arg-type]
    monkeypatch.setattr(f"{name}.limits", lambda *_: [Limit("RLIMIT_AS", 10_000, 0, stated=True, raises=True)])
    found = []
    for finder in ([], [MicroBatchFinder(replace(ALL, cache=False))]):
        data, module, record = Data(BINARY, batches(3)), make(folder, steps=(0,)), Record()
        data.micro_batch_size_step = 8  # type: ignore[attr-defined]
        trainer = quiet_trainer(plugins=fp16(), limit_val_batches=0, callbacks=[*finder, record])
        trainer.fit(module, datamodule=data)
        found.append((record.losses, record.scales))
    assert data.made
    assert found[0] == found[1]


# ---------------------------------------------------------------------- ranks


def train_rank(folder: str, planted: int) -> dict[str, Any]:
    """Ranks with a micro-batch of their own each; one has a gradient that is not finite in step 1."""
    rank = int(os.environ["RANK"])
    whole = batches(4, 2)
    data = [Batch((batch.micro[rank],), shard_tokens=(1, 1)) for batch in whole]
    module = make(folder, steps=(1,) if rank == planted else ())
    record = Record()
    trainer = quiet_trainer(
        plugins=fp16(),
        limit_val_batches=0,
        callbacks=[record],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    trainer.fit(module, datamodule=Batches(BINARY, data))
    return {
        "scales": record.scales,
        "steps": (trainer.global_step, float(steps_made(trainer.optimizers[0]))),
        "weights": {name: value.numpy() for name, value in weights(module).items()},
    }


def test_all_ranks_skip_a_step_together(folder: str) -> None:
    first, second = run_ranks(train_rank, folder, 1)
    for found in (first, second):
        assert found["scales"] == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
        assert found["steps"] == (4, 3)
    assert all((value == second["weights"][name]).all() for name, value in first["weights"].items())


# ---------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_gpu_losses_are_those_of_fp32(folder: str, attention: Any) -> None:
    found = []
    for precision in ("32-true", "16-mixed"):
        record = Record()
        options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "precision": precision}
        trainer = fit(make(folder, attention=attention), batches(50), None, record, **options)
        assert trainer.precision == precision
        found.append(torch.tensor(record.losses))
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_a_planted_infinity_is_skipped(folder: str) -> None:
    record = Record()
    options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "precision": "16-mixed"}
    trainer = fit(make(folder, steps=(1,)), batches(4), None, record, **options)
    assert record.scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
    assert float(steps_made(trainer.optimizers[0])) == 3
