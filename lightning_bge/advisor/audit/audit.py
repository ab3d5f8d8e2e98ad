"""An audit: what is really in effect in a training run, by observing a few of its steps, and what would save time."""

import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_bge.advisor.audit.ablation import (
    Ablation,
    RestoredState,
    Run,
    count_devices,
    measure,
    module_run,
    precision_ablation,
    unchanged_random_state,
)
from lightning_bge.advisor.audit.bottleneck import next_step, peak_share, step_parts
from lightning_bge.advisor.audit.checks_compute import compute_rows
from lightning_bge.advisor.audit.checks_loop import loop_rows
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.requested import ObservedRun, Requested, requested_by
from lightning_bge.advisor.audit.result import CATEGORIES, Audit, AuditConfig, Fix, Row, TimeSaved
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.lightning import LOGGERS, is_module
from lightning_bge.runtime.compat.torch import uncompiled

BATCHES = 7  # of each observed epoch: a prime, so that steps of several batches leave some over
MAX_BATCHES = 64  # of an epoch in which an optimizer step is waited for


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
    if not is_module(uncompiled(module)):
        raise ConfigError(f"module must be a LightningModule, got {type(module).__name__}")
    if trainer is not None and not isinstance(trainer, Mapping):
        raise ConfigError(
            f"trainer must be a dict of arguments for lightning.Trainer, got {type(trainer).__name__}; an audit trains "
            'several times, each with a new trainer: pass for example trainer={"precision": "bf16-mixed"}'
        )
    arguments, state = dict(trainer or {}), RestoredState()
    run = module_run(module, data, arguments, state)
    try:
        return audit_run(run, requested, config, devices=count_devices(arguments))
    finally:
        state.restore()


@dataclass
class Additions:
    """What only some runs have.

    Attributes:
        rows: further ones.
        ablations: options that are switched.
        fixed: options that keep what the observed run has found, whatever else is switched.
        savings: measured in other ways than by an ablation, by row; a text where that gave no result.
    """

    rows: Sequence[Row] = ()
    ablations: Sequence[Ablation] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    savings: Mapping[str, TimeSaved | str] = field(default_factory=dict)


def audit_run(
    run: Run,
    requested: Requested | None,
    config: AuditConfig,
    devices: int = 1,
    additions: Callable[[ObservedRun], Additions] | None = None,
) -> Audit:
    """Observe a run, measure what can be switched, and judge.

    Args:
        run: the run.
        requested: what is to be in effect; the rest is read from the run's objects.
        config: how much is measured.
        devices: that the run is configured for; one of them is observed.
        additions: what the run has beside the rows of every run; None: the other precision is measured.
    """
    with _quiet():
        observed = observe(run, requested, devices)
        step_s = observed.seen.cycle_seconds
        more = additions(observed) if additions else Additions(ablations=precision_ablation(observed))
        rows, savings = [*compute_rows(observed), *loop_rows(observed), *more.rows], dict(more.savings)
        if config.rounds and step_s:
            savings |= measure(
                run,
                more.ablations,
                rounds=config.rounds,
                time_limit=config.time_limit,
                epoch=int(observed.trainer.num_training_batches),
                fixed=more.fixed,
            )
    switches = {one.row: one for one in more.ablations}
    rows = [with_saving(row, savings.get(row.name), switches.get(row.name)) for row in rows]
    rows.sort(key=lambda row: CATEGORIES.index(row.group))
    parts, peak = step_parts(observed), peak_share(observed)
    return Audit(
        describe_machine(observed.device), tuple(rows), step_s * 1e3, parts, peak, next_step(rows, parts, peak)
    )


def observe(run: Run, requested: Requested | None = None, devices: int = 1) -> ObservedRun:
    """Observe two short epochs; longer ones where an optimizer step takes several batches."""
    batches = BATCHES
    while True:
        observer = StepObserver()
        with unchanged_random_state():
            module, trainer = run({}, observer, {"limit_train_batches": batches, "max_epochs": 2})
        seen = observer.observation
        every = seen.steps.batches_per_step
        # The second epoch needs two steps to time, three to trace, one to locate where values are read, and a rest.
        wanted = min(MAX_BATCHES, 6 * every + 1 if every else MAX_BATCHES)
        if every == 1 or batches >= wanted:
            found = requested_by(module, trainer, seen, devices)
            merged = found if requested is None else requested.with_defaults(found)
            return ObservedRun(seen, merged, module, trainer, devices)
        batches = wanted


def with_saving(row: Row, saved: TimeSaved | str | None, ablation: Ablation | None) -> Row:
    """The row with what was measured for it; what is off and would save time is to be switched on, and vice versa.

    Args:
        row: as the rule judged it.
        saved: by the optimization where it is on; a text: why it is not known; None: it was not measured.
        ablation: which switched it; None: it was measured in another way.
    """
    if isinstance(saved, str):
        return row.with_note(saved)
    if saved is None or row.verdict == "not applicable":
        return row
    if ablation is not None and ablation.on and row.verdict == "mismatch":
        return row  # both sides were trained without what was requested
    row = replace(row, time_saved=saved)
    if row.verdict != "ok" or ablation is None:
        return row
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
    loggers = [logging.getLogger(name) for name in (*LOGGERS, "lightning_bge")]
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
