"""Repeats a training run from the same state, and measures what an option saves: with it on and off, in turns."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from time import monotonic
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from scipy.stats import t as student
from torch import Tensor, nn

from lightning_bge.advisor.audit.observation import WARM_UP
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.requested import ObservedRun
from lightning_bge.advisor.audit.result import TimeSaved
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.runtime.callback_kinds import without_kinds
from lightning_bge.runtime.compat.lightning import remove_callbacks, trainer_class
from lightning_bge.runtime.compat.torch import uncompiled

# Trains from the same weights with changed options (by their dotted names), with an observer as the last callback and
# its `profiler` as the trainer's, and with arguments of the trainer that end it early.
Run = Callable[[dict[str, Any], StepObserver, dict[str, Any]], tuple[LightningModule, Trainer]]

BATCHES = 3  # timed in each round, after the warm-up
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


# ---------------------------------------------------------------------- any LightningModule


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


def module_run(module: LightningModule, data: Any, arguments: Mapping[str, Any], state: RestoredState) -> Run:
    """A run of any LightningModule.

    Args:
        module: the module.
        data: a data module, or training loaders; None: the module has its own.
        arguments: of Lightning's `Trainer`.
        state: restores the module's state when the next run begins.
    """
    kept = {name: value for name, value in arguments.items() if name not in REPLACED}
    callbacks, devices = without_kinds(arguments.get("callbacks"), REMOVED_CALLBACKS), arguments.get("devices")
    make_trainer = trainer_class(uncompiled(module))

    def run(options: dict[str, Any], observer: StepObserver, limits: dict[str, Any]) -> tuple[LightningModule, Trainer]:
        changed = {name.removeprefix("trainer."): value for name, value in options.items()}
        trainer: Trainer = make_trainer(
            **{**kept, **QUIET, **limits, **changed},
            devices=devices[:1] if isinstance(devices, list) else 1,
            profiler=observer.profiler,
            callbacks=[state, *callbacks, observer],
        )
        source = "datamodule" if hasattr(data, "train_dataloader") else "train_dataloaders"
        trainer.fit(module, **{source: data})
        return module, trainer

    return run


def count_devices(arguments: Mapping[str, Any]) -> int:
    """Devices of all nodes that these arguments of Lightning's `Trainer` ask for."""
    asked = arguments.get("devices", "auto")
    if isinstance(asked, str):
        asked = [one for one in asked.split(",") if one] if "," in asked else -1 if asked == "auto" else int(asked)
    if asked == -1:
        asked = 1 if arguments.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    return (asked if isinstance(asked, int) else len(asked)) * int(arguments.get("num_nodes", 1))


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


# ---------------------------------------------------------------------- what an option saves


@dataclass(frozen=True)
class Ablation:
    """An optimization that can be switched by an option.

    Attributes:
        row: name of its row in the audit.
        options: by their dotted names, which switch it to the other side.
        on: whether it is on as the run is configured, so that `options` switch it off.
        text: what is compared.
        yaml: the line that switches it on.
    """

    row: str
    options: dict[str, Any]
    on: bool
    text: str
    yaml: str = ""


def precision_ablation(run: ObservedRun) -> list[Ablation]:
    """The other precision, of 16 bits and fp32; none where the hardware would emulate 16 bits, which takes minutes."""
    current, fastest = str(run.trainer.precision), choose_precision(run.device.type)[0]
    mixed = current if current in ("bf16-mixed", "16-mixed") else fastest
    if (current != mixed and current != "32-true") or mixed == "32-true":
        return []
    options = {"trainer.precision": "32-true" if current == mixed else mixed}
    text = f"{'fp16' if mixed == '16-mixed' else 'bf16'} autocast with fp32 weights against fp32"
    return [Ablation(run.sixteen_bit_row, options, current == mixed, text, f"trainer.precision: {mixed}")]


def measure(
    run: Run,
    ablations: Sequence[Ablation],
    *,
    rounds: int,
    time_limit: float,
    epoch: int = WARM_UP + BATCHES + 1,
    fixed: dict[str, Any] | None = None,
) -> dict[str, TimeSaved | str]:
    """Train a few batches as configured and with each ablation, in turns, so that all see the same machine.

    Args:
        run: trains a fresh copy, each time from the same weights on the same batches.
        ablations: one change each.
        rounds: of all of them.
        time_limit: seconds after which no further round begins. What has fewer than two rounds by then is not measured,
            and neither is an ablation that fails.
        epoch: batches in an epoch. One of a single batch cannot be timed.
        fixed: options of all runs, unless an ablation changes them.

    Returns:
        By row the share of a step's time that is saved where the optimization is on, or why it was not measured.
    """
    if epoch < 2:
        return {one.row: "its saving was not measured: an epoch has one batch" for one in ablations}
    until, fixed = monotonic() + time_limit, fixed or {}
    configured: list[float] = []
    switched: dict[str, list[float]] = {one.row: [] for one in ablations}
    failed: dict[str, str] = {}
    batches = min(epoch, WARM_UP + BATCHES + 1)
    limits = {"limit_train_batches": batches, "max_epochs": math.ceil((WARM_UP + BATCHES) / (batches - 1))}
    for number in range(rounds):
        began = monotonic()
        sides: list[Ablation | None] = [None, *ablations]
        for side in sides if number % 2 == 0 else reversed(sides):  # a machine that slows down favors no side
            if side is None:
                configured.append(_time(run, fixed, limits))
            elif side.row not in failed:
                try:
                    switched[side.row].append(_time(run, {**fixed, **side.options}, limits))
                except Exception as error:  # any failure of the other side: the row states it
                    failed[side.row] = f"the other side cannot be trained: {type(error).__name__}: {error}"
        if number + 1 < rounds and monotonic() + (monotonic() - began) > until:
            break
    found: dict[str, TimeSaved | str] = {}
    for one in ablations:
        pairs = [pair for pair in zip(configured, switched[one.row], strict=False) if math.isfinite(sum(pair))]
        why = failed.get(one.row) or "fewer than two rounds could be timed within the time limit without compilation"
        unmeasured = one.row in failed or len(pairs) < 2
        found[one.row] = f"its saving was not measured: {why}" if unmeasured else time_saved(one, pairs)
    return found


def _time(run: Run, options: dict[str, Any], limits: dict[str, Any]) -> float:
    """Mean seconds of a batch; NaN: none could be timed."""
    observer = StepObserver(trace=False)
    with unchanged_random_state():
        run(options, observer, limits)
    timed = observer.observation.timed[:BATCHES]
    return fmean(cycle.seconds for cycle in timed) if timed else math.nan


def time_saved(ablation: Ablation, pairs: Sequence[tuple[float, float]]) -> TimeSaved:
    """The share of a step's time that the optimization saves where it is on, from seconds as configured and switched.

    The interval is Student's 95 % interval of the mean of the logarithms of the rounds' ratios.
    """
    configured, switched = zip(*pairs, strict=True)
    on, off = (configured, switched) if ablation.on else (switched, configured)
    logs = [math.log(a / b) for a, b in zip(on, off, strict=True)]
    mid, half = fmean(logs), float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    text = f"{ablation.text}: {fmean(on) * 1e3:.0f} ms a batch against {fmean(off) * 1e3:.0f} ms, {len(on)} rounds"
    return TimeSaved(1 - math.exp(mid + half), 1 - math.exp(mid), 1 - math.exp(mid - half), "measured", text)
