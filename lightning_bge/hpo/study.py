"""A study from its first trial to its last: opened or resumed, run, shown as it goes."""

from __future__ import annotations

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
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import JOURNAL, StudyConfig
from lightning_bge.hpo.progress import Progress, finished
from lightning_bge.hpo.pruning.asha import RESUMES, AshaPruner, AshaScheduler, nothing_left
from lightning_bge.hpo.pruning.config import build_pruner
from lightning_bge.hpo.space.parameter_sets import parse_points
from lightning_bge.hpo.space.search_space import describe_difference, parse_space, space_to_json
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage import enqueue_once, open_storage, sweep
from lightning_bge.runtime.memory import format_bytes

log = logging.getLogger("lightning_bge")


def open_study(
    run_dir: Path,
    config: StudyConfig,
    direction: Literal["maximize", "minimize"],
    steps: Steps,
    settings: dict[str, Any],
) -> optuna.Study:
    """Create the study of a run folder, or go on with it, and queue those of `config.enqueue` that are new to it.

    The study is named after its folder, and the name never changes: Hyperband's brackets depend on it.

    Args:
        run_dir: the run's folder; the journal lies in it.
        config: the search.
        direction: of the score: `maximize` or `minimize`. A cost is the second objective.
        steps: what a trial that runs to its end reports.
        settings: whatever makes trials comparable, as plain data: model, data, metric, folds, epochs.

    Raises:
        ConfigError: space or points are wrong; nothing is written.
        StudyError: the folder holds a study of another space or of other settings; says what differs.
    """
    parsed = parse_space(config.space)
    points = parse_points(config.enqueue, parsed)
    seeded = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[config.sampler]
    storage = open_storage(run_dir / JOURNAL)
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    resumed = any(summary.study_name == run_dir.name for summary in summaries)
    study = optuna.create_study(
        storage=storage,
        study_name=run_dir.name,
        directions=[direction] if config.cost is None else [direction, "minimize"],
        # the seed moves on with the trials that are there, else a resumed study would draw its first points again
        sampler=seeded(seed=config.seed + (_n_trials(storage, run_dir.name) if resumed else 0)),
        pruner=build_pruner(config.pruner, config.n_trials, steps),
        load_if_exists=True,
    )
    space = space_to_json(parsed)
    settings = json.loads(json.dumps(settings))
    if config.cost is not None:  # else left out, so that studies of before can go on
        settings["hpo.cost"] = config.cost
    if "space" not in study.user_attrs or "settings" not in study.user_attrs:
        study.set_user_attr("space", space)
        study.set_user_attr("settings", settings)
    if study.user_attrs.get("steps") != asdict(steps):
        study.set_user_attr("steps", asdict(steps))
    _check_same(run_dir, study, space, settings)
    sweep(study)
    enqueue_once(study, points, run_dir / JOURNAL)
    return study


def _n_trials(storage: optuna.storages.BaseStorage, name: str) -> int:
    return storage.get_n_trials(storage.get_study_id_from_name(name))


def _check_same(run_dir: Path, study: optuna.Study, space: dict[str, Any], settings: dict[str, Any]) -> None:
    found = []
    if difference := describe_difference(study.user_attrs["space"], space):
        found.append(f"the search space:\n  {difference}".replace("\n", "\n  "))
    found += differences(study.user_attrs["settings"], settings)
    if found:
        raise StudyError(
            f"{run_dir} holds a study whose trials can't be compared with the ones asked for. What differs:\n  "
            + "\n  ".join(found)
            + "\nName another --run_dir, or delete that folder."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say how two flat dictionaries of settings differ, one line for each name; a missing one counts as None."""
    return [
        f"{name}: {old.get(name)} there, {new.get(name)} asked"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def quiet_optuna() -> None:
    """Keep Optuna's own lines away: `Progress` prints one a trial, and a failed trial's error ends the program."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def is_finished(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether no trial is missing, or is to be resumed; others may still be running some beyond."""
    if isinstance(study.pruner, AshaPruner):
        return nothing_left(study, study.pruner, config.n_trials)
    return finished(study) >= config.n_trials


def others_go_on(study: optuna.Study) -> bool:
    """Whether other processes run trials whose end may let further paused ones be resumed: they end the study."""
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
        config: the search.
        metric: its name.
        n_reports: reports of a trial that runs to its end.
        paused_dir: where the pruner `asha` keeps paused trials.

    Raises:
        MemoryKeptError: a trial ran out of memory and something still holds some of what it took. The trial is told to
            the study. A new process on the same folder goes on; this one would run out of memory earlier and earlier.
    """
    if is_finished(study, config):
        return
    progress = Progress(config.n_trials, metric, n_reports, config)
    scheduler = _scheduler(study, config, paused_dir)
    callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [
        *(progress, scheduler or _stop_after(config.n_trials), stop_if_memory_is_kept)
    ]
    until = math.inf if config.timeout is None else time.monotonic() + config.timeout
    gc.collect()
    gc.freeze()  # what the libraries have made so far is not searched again after each trial
    try:
        while not is_finished(study, config) and time.monotonic() < until:
            if scheduler is not None:
                scheduler(study)
            left = None if config.timeout is None else max(0.0, until - time.monotonic())
            study.optimize(objective, timeout=left, callbacks=callbacks)
            sweep(study)  # another process may have died and left something to do
        while scheduler is not None and scheduler.resume_best(study):
            print("the time is over, and no trial has run to its end yet: the best paused one goes on", flush=True)
            study.optimize(objective, n_trials=1, callbacks=[progress, stop_if_memory_is_kept])
    finally:
        gc.unfreeze()


def _scheduler(study: optuna.Study, config: StudyConfig, paused_dir: Path | None) -> AshaScheduler | None:
    """What resumes paused trials; None, and no paused trials are kept, where the pruner is another."""
    if isinstance(study.pruner, AshaPruner):
        assert paused_dir is not None
        room = config.pruner.paused_gb
        return AshaScheduler(study.pruner, config.n_trials, paused_dir, None if room is None else room * 2**30)
    if paused_dir is not None and paused_dir.is_dir():
        log.warning(
            "%s: trials that another pruner paused; deleted, as %s resumes none", paused_dir, config.pruner.name
        )
        shutil.rmtree(paused_dir)
    return None


def _stop_after(trials: int) -> Callable[[optuna.Study, FrozenTrial], None]:
    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if finished(study) >= trials:
            study.stop()

    return stop


class MemoryKeptError(StudyError):
    """What an out-of-memory trial took was not all given back."""


def stop_if_memory_is_kept(study: optuna.Study, trial: FrozenTrial) -> None:
    """Optuna calls this after each trial."""
    kept = trial.user_attrs.get("memory_kept")
    if kept is not None:
        raise MemoryKeptError(
            f"trial {trial.number} ran out of memory, and {format_bytes(kept)} of what it took are still held: "
            "start the same command again, in a new process; the study goes on from there"
        )
