"""What is really in effect in a training run, found out by watching a few of its steps."""

from __future__ import annotations

import logging
import platform
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_bge.advisor.audit.ablation import Measured, Variation, gain_of, measure_variations, optimizer_gains
from lightning_bge.advisor.audit.checks_compute import Case, Gain, Row, compute_rows
from lightning_bge.advisor.audit.checks_data import data_rows, loop_rows
from lightning_bge.advisor.audit.observe import Watch
from lightning_bge.advisor.audit.requested import Claims, claims_of
from lightning_bge.advisor.audit.scorecard import Score, next_step, peak_share, scores, step_parts
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.errors import ConfigError

BATCHES = 7  # of each epoch that is watched: a prime, so that windows of several batches leave a rest
MOST_BATCHES = 64  # in which an optimizer step is waited for


@dataclass(frozen=True)
class AuditConfig:
    """The audit.

    Attributes:
        rounds: how often each setting is measured, in turns with the others; 0: nothing is switched off and on, and
            no gain is measured but those of what was seen. 5, as an interval of fewer is wide.
        seconds: begin no further round of measuring gains after so long.
        compile_s: try torch.compile on one layer for at most so long, to predict its gain; 0: not at all.
        json: write the report as JSON there too.

    Raises:
        ConfigError: a value is below 0.
    """

    rounds: int = 5
    seconds: float = 90.0
    compile_s: float = 30.0
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "seconds", "compile_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        machine: on which.
        rows: of all optimisations.
        scores: time at the best setting known over the time now, by category.
        step_ms: milliseconds from one batch to the next.
        parts: milliseconds of a batch by what it was spent on.
        peak: floating-point operations a second against the machine's measured peak.
        next: what to do next, what it brings, and how sure that is.
    """

    machine: dict[str, Any]
    rows: tuple[Row, ...]
    scores: tuple[Score, ...]
    step_ms: float
    parts: dict[str, float]
    peak: dict[str, Any]
    next: str

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            KeyError: there is none.
        """
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(f"no row {name}; there are: {', '.join(row.name for row in self.rows)}")
        return found[0]

    @property
    def alarms(self) -> list[Row]:
        """The rows that something is wrong with: claimed and not so, or off and worth switching on."""
        return [row for row in self.rows if row.verdict in ("lie", "off")]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `audit.json` holds it."""
        return {
            "machine": self.machine,
            "rows": [row.as_dict() for row in self.rows],
            "scorecard": [asdict(score) for score in self.scores],
            "step": {"total_ms": self.step_ms, "parts": self.parts},
            "peak": self.peak,
            "next": self.next,
        }


class Subject:
    """A training run that can be repeated, and what is known of it beforehand.

    Attributes:
        devices: that it is meant for; one is watched.
    """

    devices = 1

    def run(
        self, settings: dict[str, Any], callbacks: Sequence[Callback], limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """Train afresh, from the same weights on the same batches.

        Args:
            settings: replaced ones, by their dotted names.
            callbacks: further ones, the last of all.
            limits: arguments of the trainer that end it early.
        """
        raise NotImplementedError

    def repeat(
        self, settings: dict[str, Any], callbacks: Sequence[Callback], limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """`run`, each time with the same random numbers: the same batches in the same order."""
        with _same_random_numbers():
            return self.run(settings, callbacks, limits)

    def switches(self, case: Case) -> list[Variation]:
        """What can be switched."""
        return precision_of(case)

    def rows(self, case: Case) -> list[Row]:
        """Rows that only such a run has."""
        return []

    def fixed(self, case: Case) -> dict[str, Any]:
        """Settings that are to stay as they were found, whatever else is switched."""
        return {}

    def gains(self, case: Case, config: AuditConfig) -> dict[str, Gain | str]:
        """What is measured in other ways than by switching a setting; words where that gave nothing."""
        step_s = case.seen.cycle_seconds * max(case.seen.batches_per_step, 1)
        return dict(optimizer_gains(case.module, case.device, step_s, config.rounds))


def audit(
    module: LightningModule,
    data: Any = None,
    trainer: dict[str, Any] | None = None,
    claims: Claims | None = None,
    config: AuditConfig = AuditConfig(),
) -> Audit:
    """Audit any LightningModule: train a few batches of two short epochs, and say what was really in effect.

    The module's weights, buffers, gradients and modes are put back afterwards, and so are random numbers. Nothing is
    logged, and no checkpoint is written.

    Args:
        module: that trains as you train it.
        data: a data module, or training loaders; None: the module has its own.
        trainer: your arguments of Lightning's `Trainer`, callbacks among them. Those that say how long to train and on
            how many devices are replaced: one device is watched. Checkpoints, early stopping and progress bars are left
            out, those of the module's `configure_callbacks` too.
        claims: what is said to be in effect, where it can't be read off the objects: see `Claims`.
        config: how much is measured.
    """
    rewind = Rewind()
    try:
        return audit_subject(_Foreign(module, data, dict(trainer or {}), rewind), claims, config)
    finally:
        rewind.rewind()


class Rewind(Callback):
    """Lets each `fit` of a module begin as the first one began, without what writes or ends it early."""

    def __init__(self) -> None:
        self.module: LightningModule | None = None
        self.state: dict[str, Tensor] = {}  # of parameters and buffers, those too that no checkpoint holds
        self.gradients: dict[str, Tensor] = {}
        self.modes: dict[nn.Module, bool] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave out what the module itself has asked for."""
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, _LEFT_OUT)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is there, or put it back."""
        if self.module is None:
            self.module = pl_module
            # on the host, so that a GPU holds no second model while its peak is looked at
            self.state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _state(pl_module)}
            self.gradients = {
                name: p.grad.to("cpu", copy=True) for name, p in pl_module.named_parameters() if p.grad is not None
            }
            self.modes = {part: part.training for part in pl_module.modules()}
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Put all of it back, where there is any."""
        if self.module is None:
            return
        for name, tensor in _state(self.module):
            before = self.state.get(name)
            if before is not None and before.shape == tensor.shape:  # else a cache that was made, or grew, on the way
                tensor.copy_(before)
        for name, parameter in self.module.named_parameters():
            gradient = self.gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for part, training in self.modes.items():
            part.training = training


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@dataclass(frozen=True)
class _Foreign(Subject):
    module: LightningModule
    data: Any
    trainer: dict[str, Any]
    rewind: Rewind

    @property
    def devices(self) -> int:  # type: ignore[override]
        """As the trainer's arguments say."""
        asked = self.trainer.get("devices", "auto")
        if isinstance(asked, str):
            asked = [one for one in asked.split(",") if one] if "," in asked else -1 if asked == "auto" else int(asked)
        if asked == -1:
            asked = 1 if self.trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
        count = asked if isinstance(asked, int) else len(asked)
        return count * int(self.trainer.get("num_nodes", 1))

    def run(
        self, settings: dict[str, Any], callbacks: Sequence[Callback], limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        given = {name: value for name, value in self.trainer.items() if name not in _OURS}
        listed = given.pop("callbacks", None) or []
        listed = [listed] if isinstance(listed, Callback) else listed
        own = [callback for callback in listed if not isinstance(callback, _LEFT_OUT)]
        devices = given.pop("devices", 1)
        given["devices"] = devices[:1] if isinstance(devices, list) else 1
        changed = {name.removeprefix("trainer."): value for name, value in settings.items()}
        made = Trainer(**{**given, **_QUIET, **limits, **changed, "callbacks": [self.rewind, *own, *callbacks]})
        if hasattr(self.data, "train_dataloader"):
            made.fit(self.module, datamodule=self.data)
        else:
            made.fit(self.module, train_dataloaders=self.data)
        return self.module, made


# arguments of the trainer that an audit sets itself
_OURS = (
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "limit_train_batches",
    "val_check_interval",
    "fast_dev_run",
    "profiler",
    "strategy",
    "num_nodes",
)
_LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar)
_QUIET: dict[str, Any] = {
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "logger": DummyLogger(),  # modules and callbacks may ask for one
    # one batch, as schedules may wait for a metric of validation
    **{"num_sanity_val_steps": 0, "limit_val_batches": 1},
}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers outside are as if nothing had run, and nothing is told of each of many short runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_bge")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # what is planted would warn
    try:
        with _same_random_numbers(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # epochs are cut short here
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Random numbers afterwards are as they were before: of torch, NumPy and Python."""
    numbers, known = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(known)


def precision_of(case: Case) -> list[Variation]:
    """The other precision, of bf16 and fp32; bf16 only where it is not emulated, which takes minutes."""
    current = str(case.trainer.precision)
    bf16, pays = current == "bf16-mixed", choose_precision(case.device.type)[0] == "bf16-mixed"
    if not bf16 and (current != "32-true" or not pays):
        return []
    switch = {"trainer.precision": "32-true" if bf16 else "bf16-mixed"}
    text = "bf16 autocast over fp32 weights against fp32"
    return [Variation("bf16 matrix products", switch, bf16, text, "trainer.precision: bf16-mixed")]


def audit_subject(subject: Subject, claims: Claims | None, config: AuditConfig) -> Audit:
    """Watch a run, measure what can be switched, and judge.

    Args:
        subject: the run.
        claims: over those that the objects make.
        config: how much is measured.
    """
    with _undisturbed():
        case = observe(subject, claims)
        rows = [*compute_rows(case), *data_rows(case), *loop_rows(case), *subject.rows(case)]
        switches, measured, gains = subject.switches(case), Measured(), {}
        if config.rounds and case.seen.cycle_seconds:
            measured = measure_variations(
                *(subject.repeat, switches, config.rounds, config.seconds),
                epoch=int(case.trainer.num_training_batches),
                fixed=subject.fixed(case),
            )
            gains = subject.gains(case, config)
        rows = [judged(row, switches, measured, gains) for row in rows]
        parts = step_parts(case)
        return Audit(
            machine=describe_machine(case.device),
            rows=tuple(rows),
            scores=tuple(scores(rows, case.seen.cycle_seconds * 1e3)),
            step_ms=case.seen.cycle_seconds * 1e3,
            parts=parts,
            peak=peak_share(case),
            next=next_step(rows, parts),
        )


def observe(subject: Subject, claims: Claims | None = None) -> Case:
    """Two short epochs, watched; longer ones where an optimizer step takes several batches."""
    batches = BATCHES
    while True:
        watch = Watch()
        module, trainer = subject.repeat({}, [watch], {"limit_train_batches": batches, "max_epochs": 2})
        seen = watch.observation
        every = seen.batches_per_step
        wanted = min(MOST_BATCHES, 6 * every + 1 if every else MOST_BATCHES)
        # the second epoch is to hold two windows to time, three to trace, one to see where values are read, and a rest
        if every == 1 or batches >= wanted:
            found = claims_of(module, trainer, seen, subject.devices)
            return Case(seen, found if claims is None else claims.over(found), module, trainer, subject.devices)
        batches = wanted


def judged(row: Row, variations: Sequence[Variation], measured: Measured, gains: dict[str, Gain | str]) -> Row:
    """A row with its measured gain; what is off and would bring something is to be switched on."""
    found = [variation for variation in variations if variation.row == row.name]
    if row.name in measured.skipped:
        return replace(row, evidence=f"{row.evidence}; its gain was not measured: {measured.skipped[row.name]}")
    if found and found[0].on and row.verdict == "lie":
        return row  # both sides lack what was claimed
    gain = gain_of(found[0], measured) if found else gains.get(row.name)
    if gain is None or row.verdict == "not applicable":
        return row
    if isinstance(gain, str):
        return replace(row, evidence=f"{row.evidence}; {gain}")
    row = replace(row, gain=gain)
    if row.verdict == "ok" and not found and row.advice and gain.low > 0:
        return replace(row, verdict="off")
    if row.verdict != "ok" or not found:
        return row
    on = found[0].on
    if not on and gain.low > 0:
        return replace(
            row, verdict="off", advice=f"switch it on: {found[0].text}", yaml=found[0].yaml, effort="one line"
        )
    if on and gain.high < 0:
        advice = f"switch it off: {found[0].text}"
        # of the time now, as of all that is off: what being off saves
        low, mid, high = (1 - 1 / (1 - end) for end in (gain.high, gain.mid, gain.low))
        better = replace(gain, low=low, mid=mid, high=high)
        return replace(row, verdict="off", gain=better, advice=advice, effort="one line")
    return row


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    precision, why = choose_precision("auto")
    return {
        "device": gpu or str(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "precision that pays": f"{precision}: {why}",
    }
