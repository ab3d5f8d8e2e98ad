"""A study from its first trial to its last: opened or resumed, run, shown as it goes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.pruning import PrunerConfig, build_pruner
from lightning_bge.hpo.space import describe_difference, parse_space, space_to_json
from lightning_bge.hpo.storage import open_storage, sweep
from lightning_bge.memory import size

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
JOURNAL = "journal.log"


@dataclass(frozen=True)
class StudyConfig:
    """The search.

    Attributes:
        trials: how many trials are to be finished, completed or pruned, in all; raise it to go on with a study.
        space: what is searched: dotted name of a setting -> {low, high, log, step} or {choices: [...]}.
        pruner: which trials are stopped early.
        sampler: tpe (Optuna's default: multivariate, with constant liar) or random.
        seed: of the sampler.
        hours: start no further trial after so many hours of this call; null: no limit.
        refit: train the best settings on all rows at the end, and export the model.
    """

    trials: int = 100
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    pruner: PrunerConfig = PrunerConfig()  # noqa: RUF009 - frozen
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 42
    hours: float | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"hpo.trials: expected 1 or more, got {self.trials}")
        if self.hours is not None and self.hours <= 0:
            raise ConfigError(f"hpo.hours: expected more than 0 or null, got {self.hours}")


def open_study(
    run_dir: Path,
    config: StudyConfig,
    direction: Literal["maximize", "minimize"],
    n_reports: int,
    settings: dict[str, Any],
) -> optuna.Study:
    """Create the study of a run folder, or go on with it.

    The study is named after its folder, and the name never changes: Hyperband's brackets depend on it.

    Args:
        run_dir: the run's folder; the journal lies in it.
        config: the search.
        direction: `maximize` or `minimize`.
        n_reports: reports of a trial that runs to its end: folds x epochs.
        settings: whatever makes trials comparable, as plain data: model, data, metric, folds, epochs.

    Raises:
        StudyError: the folder holds a study of another space or of other settings; says what differs.
    """
    seeded = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[config.sampler]
    storage = open_storage(run_dir / JOURNAL)
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    resumed = any(summary.study_name == run_dir.name for summary in summaries)
    study = optuna.create_study(
        storage=storage,
        study_name=run_dir.name,
        direction=direction,
        # the seed moves on with the trials that are there, else a resumed study would draw its first points again
        sampler=seeded(seed=config.seed + (_n_trials(storage, run_dir.name) if resumed else 0)),
        pruner=build_pruner(config.pruner, config.trials, n_reports),
        load_if_exists=True,
    )
    space = space_to_json(parse_space(config.space))
    settings = json.loads(json.dumps(settings))
    if "space" not in study.user_attrs or "settings" not in study.user_attrs:
        study.set_user_attr("space", space)
        study.set_user_attr("settings", settings)
    _check_same(run_dir, study, space, settings)
    sweep(study)
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


def count(study: optuna.Study, *states: TrialState) -> int:
    """Number of trials in any of the states."""
    return len(study.get_trials(deepcopy=False, states=states))


def run_study(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], config: StudyConfig, metric: str, n_reports: int
) -> None:
    """Run the trials that are still missing; several processes may do so at once on one folder.

    Raises:
        MemoryKeptError: a trial ran out of memory and something still holds some of what it took. The trial is told to
            the study. A new process on the same folder goes on; this one would run out of memory earlier and earlier.
    """
    if count(study, *FINISHED) >= config.trials:
        return
    progress = Progress(config.trials, metric, n_reports)
    gc.collect()
    gc.freeze()  # what the libraries have made so far is not searched again after each trial
    try:
        study.optimize(
            objective,
            timeout=None if config.hours is None else config.hours * 3600,
            callbacks=[progress, MaxTrialsCallback(config.trials, states=FINISHED), stop_if_memory_is_kept],
        )
    finally:
        gc.unfreeze()


class MemoryKeptError(StudyError):
    """What an out-of-memory trial took was not all given back."""


def stop_if_memory_is_kept(study: optuna.Study, trial: FrozenTrial) -> None:
    """Optuna calls this after each trial."""
    kept = trial.user_attrs.get("memory_kept")
    if kept is not None:
        raise MemoryKeptError(
            f"trial {trial.number} ran out of memory, and {size(kept)} of what it took are still held: "
            "start the same command again, in a new process; the study goes on from there"
        )


class Progress:
    """Prints a line after each trial: what became of it, trials done and pruned, the best so far, the time left."""

    def __init__(self, trials: int, metric: str, n_reports: int) -> None:
        self.trials, self.metric, self.n_reports = trials, metric, n_reports
        self.start = time.monotonic()
        self.mine = 0

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna calls this after each trial."""
        self.mine += 1
        done, pruned = count(study, *FINISHED), count(study, TrialState.PRUNED)
        passed = time.monotonic() - self.start
        # other workers finish trials as well: the rate is that of all, where they are as fast as this one
        workers = 1 + count(study, TrialState.RUNNING)
        left = passed / self.mine * max(0, self.trials - done) / workers
        print(
            f"[{done:>{len(str(self.trials))}}/{self.trials}] trial {trial.number} {self._end(trial)} | "
            f"{pruned} pruned | {self._best(study)} | {_clock(passed)} passed, about {_clock(left)} left",
            flush=True,
        )

    def _end(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.COMPLETE:
            return f"done: {self.metric} {trial.value:.4f}"
        if "oom_where" in trial.user_attrs:
            return f"pruned: out of memory in {trial.user_attrs['oom_where']}"
        if trial.state == TrialState.PRUNED:
            at = trial.user_attrs.get("pruned_at", trial.last_step)
            value = trial.intermediate_values.get(trial.last_step) if trial.last_step else None
            shown = "no value" if value is None else f"{self.metric} {value:.4f}"
            return f"pruned at report {at} of {self.n_reports}: {shown}"
        return "failed"

    def _best(self, study: optuna.Study) -> str:
        if count(study, TrialState.COMPLETE) == 0:
            return "no trial complete yet"
        return f"best {study.best_value:.4f} (trial {study.best_trial.number})"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
