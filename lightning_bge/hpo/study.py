"""A study opened or resumed, and its trials run."""

import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import FINISHED, JOURNAL, StudyConfig
from lightning_bge.hpo.progress import Progress, finished
from lightning_bge.hpo.pruning.asha import AshaPruner, nothing_left
from lightning_bge.hpo.pruning.asha_scheduler import AshaScheduler
from lightning_bge.hpo.pruning.asha_trials import RESUMES
from lightning_bge.hpo.pruning.config import build_pruner
from lightning_bge.hpo.space.parameter_sets import parse_enqueued
from lightning_bge.hpo.space.search_space import parse_space, space_to_json
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.journal import JournalLock, hold, open_storage
from lightning_bge.hpo.storage.workers import sweep
from lightning_bge.runtime.memory import format_bytes

log = logging.getLogger("lightning_bge")


def open_study(
    run_dir: Path,
    config: StudyConfig,
    direction: Literal["maximize", "minimize"],
    steps: Steps,
    options: dict[str, Any],
) -> optuna.Study:
    """Create or resume the study of a run folder, and queue those of `config.enqueue` that are new to it.

    The study is named after its folder, and the name never changes: Hyperband's brackets depend on it.

    Args:
        run_dir: the run's folder, with the journal in it.
        config: the options of the study.
        direction: of the score: `maximize` or `minimize`. A cost is the second objective.
        steps: what a trial that runs to its end reports.
        options: those that must be equal for trials to be comparable, by dotted names, as plain data.

    Raises:
        ConfigError: the space or the enqueued parameter sets are wrong; nothing is written.
        StudyError: the folder holds a study with another space or other options; the message lists the differences.
    """
    parsed = parse_space(config.space)
    enqueued = parse_enqueued(config.enqueue, parsed)
    seeded = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[config.sampler]
    storage = open_storage(run_dir / JOURNAL)
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    # the number of trials is added, else a resumed study would draw its first parameter sets a second time
    before = sum(summary.n_trials for summary in summaries if summary.study_name == run_dir.name)
    study = optuna.create_study(
        storage=storage,
        study_name=run_dir.name,
        directions=[direction] if config.cost is None else [direction, "minimize"],
        sampler=seeded(seed=config.sampler_seed + before),
        pruner=build_pruner(config.pruner, config.n_trials, steps),
        load_if_exists=True,
    )
    space = space_to_json(parsed)
    options = json.loads(json.dumps(options))
    if config.cost is not None:
        options["hpo.cost"] = config.cost
    known = study.user_attrs
    if "space" not in known or "settings" not in known:
        study.set_user_attr("space", space)
        study.set_user_attr("settings", options)
    if known.get("steps") != asdict(steps):
        study.set_user_attr("steps", asdict(steps))
    _check_same(run_dir, study, space, options)
    sweep(study)
    enqueue_once(study, enqueued, run_dir / JOURNAL)
    return study


def _check_same(run_dir: Path, study: optuna.Study, space: dict[str, Any], options: dict[str, Any]) -> None:
    attributes = study.user_attrs
    found = differences({"hpo.space": attributes["space"], **attributes["settings"]}, {"hpo.space": space, **options})
    if found:
        raise StudyError(
            f"{run_dir} holds a study whose trials can't be compared with the requested ones. Differences:\n  "
            + "\n  ".join(found)
            + "\nName another run_dir, or delete that folder."
        )


def enqueue_once(study: optuna.Study, parameter_sets: Sequence[dict[str, Any]], journal: Path) -> int:
    """Queue the parameter sets that this study has never queued before; they are tried before anything is drawn.

    Several processes may call it at once, and each start of a study does. A trial that was queued holds its parameter
    set in the user attribute `enqueued`. The retry of a killed trial is queued by `sweep`, not here.

    Args:
        study: the study.
        parameter_sets: values by the names of parameters; the others are drawn.
        journal: the study's journal; the lock's files are beside it.

    Returns:
        How many were queued.
    """
    # The journal's own lock covers one record at a time, and this reads and writes many. A process on another host that
    # is stopped for more than 30 s in the middle loses this lock (see `JournalLock`); parameter sets may then be queued
    # twice, which costs a trial each. After a process was killed in the middle, the next call queues the rest.
    with hold(JournalLock(journal.with_name(f"{journal.name}.enqueue"))):
        known = [trial.user_attrs.get("enqueued") for trial in study.get_trials(deepcopy=False)]
        missing = [values for values in parameter_sets if values not in known]
        for values in missing:
            study.enqueue_trial(values, user_attrs={"enqueued": values})
    return len(missing)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """How two nested dictionaries of options differ, one line for each dotted name; a missing one counts as None."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} in the folder, {after} requested")
    return lines


def quiet_optuna() -> None:
    """Show Optuna's errors only: `Progress` prints a line for each trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def is_finished(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether no trial is missing, and none is to be resumed; other processes may be running more than were planned."""
    if isinstance(study.pruner, AshaPruner):
        return nothing_left(study, study.pruner, config.n_trials)
    return finished(study) >= config.n_trials


def others_running(study: optuna.Study) -> bool:
    """Whether other processes run trials after whose end paused ones may be resumed: those processes end the study."""
    if not isinstance(study.pruner, AshaPruner):
        return False
    sweep(study)
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    return any(trial.state == TrialState.RUNNING or RESUMES in trial.user_attrs for trial in trials)


def run_study(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float | Sequence[float]],
    config: StudyConfig,
    metric: str,
    n_reports: int,
    paused_dir: Path | None = None,
) -> None:
    """Run the trials that are still missing; several processes may do so at once on one folder.

    Args:
        study: the study.
        objective: trains a trial.
        config: the options of the study.
        metric: its name.
        n_reports: reports of a trial that runs to its end.
        paused_dir: where the pruner `asha` keeps paused trials.

    Raises:
        MemoryKeptError: a trial ran out of memory, and some of what it took is still held. The study has the trial. A
            new process can continue the study; this one would run out of memory earlier each time.
    """
    if is_finished(study, config):
        return
    progress = Progress(config, metric, n_reports)
    scheduler = _scheduler(study, config, paused_dir)
    callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [
        *(progress, scheduler or MaxTrialsCallback(config.n_trials, FINISHED), stop_if_memory_is_kept)
    ]
    until = math.inf if config.timeout is None else time.monotonic() + config.timeout
    gc.collect()
    gc.freeze()  # else the objects of the libraries would be searched after each trial
    try:
        while not is_finished(study, config) and time.monotonic() < until:
            if scheduler is not None:
                scheduler(study)
            left = None if config.timeout is None else max(0.0, until - time.monotonic())
            study.optimize(objective, timeout=left, callbacks=callbacks)
            sweep(study)  # a process that died may have left a trial to be run
        while scheduler is not None and scheduler.resume_best(study):
            print("hpo.timeout is over and no trial is complete: the best paused one is resumed", flush=True)
            study.optimize(objective, n_trials=1, callbacks=[progress, stop_if_memory_is_kept])
    finally:
        gc.unfreeze()


def _scheduler(study: optuna.Study, config: StudyConfig, paused_dir: Path | None) -> AshaScheduler | None:
    """What resumes paused trials; None for another pruner, whose study keeps no paused trials."""
    if isinstance(study.pruner, AshaPruner):
        assert paused_dir is not None
        room = config.pruner.paused_gb
        return AshaScheduler(study.pruner, config.n_trials, paused_dir, None if room is None else room * 2**30)
    if paused_dir is not None and paused_dir.is_dir():
        log.warning(
            "%s: deleting trials that another pruner has paused; %s resumes none", paused_dir, config.pruner.name
        )
        shutil.rmtree(paused_dir)
    return None


class MemoryKeptError(StudyError):
    """Memory of a trial that ran out of it is still held."""


def stop_if_memory_is_kept(study: optuna.Study, trial: FrozenTrial) -> None:
    """Optuna calls this after each trial."""
    kept = trial.user_attrs.get("memory_kept")
    if kept is not None:
        raise MemoryKeptError(
            f"trial {trial.number} ran out of memory, and {format_bytes(kept)} of what it took are still held. "
            "Start the study in a new process, which continues it"
        )
