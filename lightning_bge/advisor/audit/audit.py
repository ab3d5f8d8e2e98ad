"""An audit: what is really in effect in a training run, by observing a few of its steps, and what would save time."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_bge.advisor.audit.ablation import Ablation, Timings, measure_ablations, time_saved
from lightning_bge.advisor.audit.bottleneck import next_step, peak_share, step_parts
from lightning_bge.advisor.audit.checks.compute import compute_rows
from lightning_bge.advisor.audit.checks.data import data_rows
from lightning_bge.advisor.audit.checks.loop import loop_rows
from lightning_bge.advisor.audit.checks.memory import memory_rows
from lightning_bge.advisor.audit.checks.precision import precision_rows
from lightning_bge.advisor.audit.checks.row import Fix, ObservedRun, Row, TimeSaved, alarms
from lightning_bge.advisor.audit.config import AUDIT_SCHEMA, AuditConfig
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.requested import Requested, requested_by
from lightning_bge.advisor.audit.scorecard import Score, scores
from lightning_bge.advisor.audit.training_run import ModuleRun, TrainingRun, unchanged_random_state
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.torch import uncompiled

BATCHES = 7  # of each observed epoch: a prime, so that steps of several batches leave some over
MAX_BATCHES = 64  # of an epoch in which an optimizer step is waited for


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        machine: that the figures hold for.
        rows: of all optimizations.
        scores: time with the best known options over the time now, by category.
        step_ms: milliseconds from one batch to the next.
        parts: milliseconds of a batch by what they are spent on.
        peak: FLOP/s of matrix products against the machine's measured peak.
        next: what to do next, what it saves, and how certain that is.
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
        """The rows with something to do: requested and not in effect, or with time or memory to save."""
        return alarms(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in `audit.json`."""
        return {
            "schema_version": AUDIT_SCHEMA,
            "machine": self.machine,
            "rows": [row.as_dict() for row in self.rows],
            "scorecard": [asdict(score) for score in self.scores],
            "step": {"total_ms": self.step_ms, "parts": self.parts},
            "peak": self.peak,
            "next": self.next,
        }


def audit(
    module: LightningModule,
    data: Any = None,
    trainer: Mapping[str, Any] | None = None,
    requested: Requested | None = None,
    config: AuditConfig = AuditConfig(),  # noqa: B008 - frozen
) -> Audit:
    """Audit any LightningModule: train a few batches of two short epochs, and report what was really in effect.

    The module's weights, buffers, gradients and modes are restored afterwards, and so is the state of random number
    generators. Nothing is logged, and no checkpoint is written.

    Example:
        >>> found = audit(module, train_loader, trainer={"precision": "bf16-mixed"})  # doctest: +SKIP
        >>> print(found.next, [row.name for row in found.alarms])  # doctest: +SKIP

    Args:
        module: in the state in which you train it.
        data: a data module, or training loaders; None: the module has its own.
        trainer: your arguments of Lightning's `Trainer`, callbacks among them. Those about the length of the training
            and the number of devices are replaced: one device is observed. Checkpoints, early stopping and progress
            bars are left out, those of the module's `configure_callbacks` too.
        requested: what is to be in effect, where it cannot be read from the objects: see `Requested`.
        config: how much is measured.

    Raises:
        ConfigError: an argument has the wrong type.
    """
    if not isinstance(uncompiled(module), LightningModule):
        raise ConfigError(f"module must be a LightningModule, got {type(module).__name__}")
    if trainer is not None and not isinstance(trainer, Mapping):
        raise ConfigError(
            f"trainer must be a dict of arguments for lightning.Trainer, got {type(trainer).__name__}; an audit trains "
            'several times, each with a new trainer: pass for example trainer={"precision": "bf16-mixed"}'
        )
    run = ModuleRun(module, data, dict(trainer or {}))
    try:
        return audit_run(run, requested, config)
    finally:
        run.state.restore()


def audit_run(run: TrainingRun, requested: Requested | None, config: AuditConfig) -> Audit:
    """Observe a run, measure what can be switched, and judge.

    Args:
        run: the run.
        requested: what is to be in effect; the rest is read from the run's objects.
        config: how much is measured.
    """
    with _quiet():
        observed = observe(run, requested)
        rules = (precision_rows, compute_rows, data_rows, loop_rows, memory_rows)
        found = [*(row for rule in rules for row in rule(observed)), *run.rows(observed)]
        ablations, timings, savings = run.ablations(observed), Timings(), {}
        if config.rounds and observed.seen.cycle_seconds:
            timings = measure_ablations(
                run.repeat,
                ablations,
                rounds=config.rounds,
                time_limit=config.time_limit,
                epoch=int(observed.trainer.num_training_batches),
                fixed=run.fixed_options(observed),
            )
            savings = run.savings(observed, config)
        rows = [with_saving(row, ablations, timings, savings) for row in found]
        parts, peak, step_ms = step_parts(observed), peak_share(observed), observed.seen.cycle_seconds * 1e3
    return Audit(
        machine=describe_machine(observed.device),
        rows=tuple(rows),
        scores=tuple(scores(rows, step_ms)),
        step_ms=step_ms,
        parts=parts,
        peak=peak,
        next=next_step(rows, parts, peak),
    )


def observe(run: TrainingRun, requested: Requested | None = None) -> ObservedRun:
    """Observe two short epochs; longer ones where an optimizer step takes several batches."""
    batches = BATCHES
    while True:
        observer = StepObserver()
        module, trainer = run.repeat({}, observer, {"limit_train_batches": batches, "max_epochs": 2})
        seen = observer.observation
        every = seen.steps.batches_per_step
        # The second epoch needs two steps to time, three to trace, one to locate where values are read, and a rest.
        wanted = min(MAX_BATCHES, 6 * every + 1 if every else MAX_BATCHES)
        if every == 1 or batches >= wanted:
            found = requested_by(module, trainer, seen, run.devices)
            merged = found if requested is None else requested.with_defaults(found)
            return ObservedRun(seen, merged, module, trainer, run.devices)
        batches = wanted


def with_saving(
    row: Row, ablations: Sequence[Ablation], timings: Timings, savings: Mapping[str, TimeSaved | str]
) -> Row:
    """The row with what was measured for it; what is off and would save time is to be switched on, and vice versa.

    Args:
        row: as the rule judged it.
        ablations: those that were measured.
        timings: of the ablations.
        savings: measured in other ways, by row; a text where that gave no result.
    """
    ablation = next((one for one in ablations if one.row == row.name), None)
    if row.name in timings.skipped:
        return row.with_note(f"its saving was not measured: {timings.skipped[row.name]}")
    if ablation is not None and ablation.on and row.verdict == "mismatch":
        return row  # both sides were trained without what was requested
    saved = savings.get(row.name) if ablation is None else time_saved(ablation, timings)
    if saved is None or row.verdict == "not applicable":
        return row
    if isinstance(saved, str):
        return row.with_note(saved)
    row = replace(row, time_saved=saved)
    if row.verdict != "ok":
        return row
    if ablation is None:
        return replace(row, verdict="improve") if row.fix is not None and saved.low > 0 else row
    if not ablation.on and saved.low > 0:
        fix = Fix(f"switch it on: {ablation.text}", "one line", yaml=ablation.yaml)
        return replace(row, verdict="improve", fix=fix)
    if ablation.on and saved.high < 0:
        # as a share of the time now, as for everything that is off: what switching it off saves
        low, mid, high = (1 - 1 / (1 - end) for end in (saved.high, saved.mid, saved.low))
        fix = Fix(f"switch it off: {ablation.text}", "one line")
        return replace(row, verdict="improve", time_saved=replace(saved, low=low, mid=mid, high=high), fix=fix)
    return row


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine that the figures hold for."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    precision, why = choose_precision("auto")
    return {
        "device": gpu or str(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "fastest precision": f"{precision}: {why}",
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave random numbers unchanged, and log nothing of the many short runs but errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_bge")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with unchanged_random_state(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # epochs are cut short here
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
