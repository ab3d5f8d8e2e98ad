"""Training runs that an audit can repeat: each time from the same weights, on the same batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_bge.advisor.audit.ablation import Ablation, optimizer_saving
from lightning_bge.advisor.audit.checks.row import ObservedRun, Row, TimeSaved
from lightning_bge.advisor.audit.config import AuditConfig
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.runtime.compat.lightning import remove_callbacks

# Arguments of the trainer that an audit sets itself, or that would end a run early.
REPLACED = {"max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "limit_train_batches", "fast_dev_run"}
REPLACED |= {"val_check_interval", "profiler", "strategy", "num_nodes", "devices", "callbacks"}
REMOVED_CALLBACKS = (Checkpoint, EarlyStopping, ProgressBar)
QUIET: dict[str, Any] = {
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "logger": DummyLogger(),  # modules and callbacks may ask for one
    # one batch, as schedules may need a validation metric
    **{"num_sanity_val_steps": 0, "limit_val_batches": 1},
}


class TrainingRun:
    """A training run that can be repeated, and what is known before it runs.

    Attributes:
        devices: that it is configured for; one of them is observed.
    """

    devices = 1

    def run(
        self, options: dict[str, Any], observer: StepObserver, limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """Train from the same weights on the same batches as every time.

        Args:
            options: changed ones, by their dotted names.
            observer: the last callback, and its `profiler` the trainer's.
            limits: arguments of the trainer that end it early.
        """
        raise NotImplementedError

    def repeat(
        self, options: dict[str, Any], observer: StepObserver, limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """`run`, each time with the same random numbers: the same batches in the same order."""
        with unchanged_random_state():
            return self.run(options, observer, limits)

    def ablations(self, run: ObservedRun) -> list[Ablation]:
        """What can be switched by an option."""
        return precision_ablation(run)

    def rows(self, run: ObservedRun) -> list[Row]:
        """Rows that only such a run has."""
        return []

    def fixed_options(self, run: ObservedRun) -> dict[str, Any]:
        """Options that keep what the observed run has found, whatever else is switched."""
        return {}

    def savings(self, run: ObservedRun, config: AuditConfig) -> dict[str, TimeSaved | str]:
        """What is measured in other ways than by an ablation, by row; a text where that gave no result."""
        step_s = run.seen.cycle_seconds * run.seen.batches_per_step
        saved = optimizer_saving(run.module, run.device, step_s, config.rounds)
        return {} if saved is None else {"fused optimizer": saved}


class RestoredState(Callback):
    """Lets each `fit` of a module start from the state of the first one, without what writes files or ends it early."""

    def __init__(self) -> None:
        self._module: LightningModule | None = None
        self._tensors: dict[str, Tensor] = {}  # of parameters and buffers, those too that no checkpoint holds
        self._gradients: dict[str, Tensor] = {}
        self._training: dict[nn.Module, bool] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove callbacks that the module itself has configured."""
        remove_callbacks(trainer, REMOVED_CALLBACKS)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the module's state, or restore it."""
        if self._module is None:
            self._module = pl_module
            # in the host's memory, so that a GPU holds no second model while its peak is measured
            self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(pl_module)}
            self._gradients = {
                name: p.grad.to("cpu", copy=True) for name, p in pl_module.named_parameters() if p.grad is not None
            }
            self._training = {part: part.training for part in pl_module.modules()}
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore weights, buffers, gradients and modes, if they were kept."""
        if self._module is None:
            return
        for name, tensor in _tensors(self._module):
            before = self._tensors.get(name)
            if before is not None and before.shape == tensor.shape:  # else a cache that was made, or has grown
                tensor.copy_(before)
        for name, parameter in self._module.named_parameters():
            gradient = self._gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for part, training in self._training.items():
            part.training = training


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@dataclass(frozen=True)
class ModuleRun(TrainingRun):
    """A run of any LightningModule.

    Args:
        module: the module.
        data: a data module, or training loaders; None: the module has its own.
        trainer: arguments of Lightning's `Trainer`.
    """

    module: LightningModule
    data: Any
    trainer: Mapping[str, Any]
    state: RestoredState = field(default_factory=RestoredState)

    @property
    def devices(self) -> int:  # type: ignore[override]
        """By the trainer's arguments."""
        asked = self.trainer.get("devices", "auto")
        if isinstance(asked, str):
            asked = [one for one in asked.split(",") if one] if "," in asked else -1 if asked == "auto" else int(asked)
        if asked == -1:
            asked = 1 if self.trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
        count = asked if isinstance(asked, int) else len(asked)
        return count * int(self.trainer.get("num_nodes", 1))

    def run(
        self, options: dict[str, Any], observer: StepObserver, limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """Fit the module; its state is restored when the next run begins."""
        arguments = {name: value for name, value in self.trainer.items() if name not in REPLACED}
        given = self.trainer.get("callbacks") or []
        given = [given] if isinstance(given, Callback) else given
        callbacks = [callback for callback in given if not isinstance(callback, REMOVED_CALLBACKS)]
        devices = self.trainer.get("devices")
        changed = {name.removeprefix("trainer."): value for name, value in options.items()}
        trainer = Trainer(
            **{**arguments, **QUIET, **limits, **changed},
            devices=devices[:1] if isinstance(devices, list) else 1,
            profiler=observer.profiler,
            callbacks=[self.state, *callbacks, observer],
        )
        if hasattr(self.data, "train_dataloader"):
            trainer.fit(self.module, datamodule=self.data)
        else:
            trainer.fit(self.module, train_dataloaders=self.data)
        return self.module, trainer


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restore the state of the random number generators of torch, NumPy and Python afterwards."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def precision_ablation(run: ObservedRun) -> list[Ablation]:
    """The other precision, of bf16 and fp32; none where the hardware would emulate bf16, which takes minutes."""
    current = str(run.trainer.precision)
    bf16, supported = current == "bf16-mixed", choose_precision(run.device.type)[0] == "bf16-mixed"
    if not bf16 and (current != "32-true" or not supported):
        return []
    options = {"trainer.precision": "32-true" if bf16 else "bf16-mixed"}
    text = "bf16 autocast with fp32 weights against fp32"
    return [Ablation("bf16 matrix products", options, bf16, text, "trainer.precision: bf16-mixed")]
