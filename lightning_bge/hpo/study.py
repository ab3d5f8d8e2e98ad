"""The study of a run folder: created, continued, or begun anew from the trials of an earlier search space."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.analysis.journal import TAKEN_OVER, present_study, study_names
from lightning_bge.hpo.config import JOURNAL, StudyConfig
from lightning_bge.hpo.pruning.config import build_pruner
from lightning_bge.hpo.space.draw import space_size
from lightning_bge.hpo.space.parameter_sets import parse_enqueued
from lightning_bge.hpo.space.search_space import Space, is_drawn, parse_space, space_to_json
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import living_workers
from lightning_bge.hpo.trials import NOT_TRAINED
from lightning_bge.runtime.compat.optuna import storage_of


def open_study(
    run_dir: Path,
    config: StudyConfig,
    direction: Literal["maximize", "minimize"],
    steps: Steps,
    options: dict[str, Any],
    configured: Mapping[str, Any] | None = None,
    worker: str = "",
) -> optuna.Study:
    """Create or continue the study of a run folder. Call it under the lock of the folder.

    The study has the name that its folder had at first, and the name never changes: Hyperband's brackets depend on it.
    With a changed search space a new study begins in the same journal, which takes over the trials that fit into it.

    Args:
        run_dir: the run's folder, with the journal in it.
        config: the options of the study.
        direction: of the score: `maximize` or `minimize`. A cost is the second objective.
        steps: what a trial that runs to its end reports.
        options: those that must be equal for trials to be comparable, by dotted names, as plain data.
        configured: the configured values of all options, by dotted names: a parameter that is not searched any more
            has them.
        worker: the id of this process among the workers.

    Raises:
        ConfigError: the space is wrong; nothing is written.
        StudyError: the folder holds a study with other options, or processes are at work on it with another space,
            pruner or sampler; the message lists the differences.
    """
    space = parse_space(config.space)
    pruner = build_pruner(config.pruner, int(min(config.n_trials, space_size(space))), steps)
    storage = open_storage(run_dir / JOURNAL)
    present = present_study(storage)
    content, methods = _attributes(config, space, options, steps)
    options = content["settings"]

    def create(name: str) -> optuna.Study:
        directions = [direction] if config.cost is None else [direction, "minimize"]
        return _create(storage, name, directions, config, pruner, content | {"methods": methods})

    if present is None:
        return create(run_dir.resolve().name)
    old = optuna.load_study(study_name=present, storage=storage)
    found = old.user_attrs
    old_space = found.get("space", content["space"])
    changed = {name for name in {*old_space, *content["space"]} if old_space.get(name) != content["space"].get(name)}
    _check_options(run_dir, *(without(one, changed) for one in (found.get("settings", options), options)))
    if living_workers(run_dir) - {worker}:
        _check_methods(run_dir, {"hpo.space": old_space, **found.get("methods", methods)}, content["space"], methods)
    if old_space == content["space"]:
        return create(present)
    names = study_names(storage)
    begun = names.index(present) + 1
    for name in names[begun:]:  # a process that was killed in the middle has left it
        optuna.delete_study(study_name=name, storage=storage)
    name = f"{names[0]}-space-{begun + 1}"
    _take_over(old, name, space, configured or {}, same_steps=found.get("steps") == content["steps"])
    study = create(name)
    study.set_user_attr(TAKEN_OVER, True)
    return study


def _attributes(
    config: StudyConfig, space: Space, options: Mapping[str, Any], steps: Steps
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same for trials to be comparable, and what may change while nobody is at work; plain data."""
    settings = {**options, **({} if config.cost is None else {"hpo.cost": config.cost})}
    content = {"space": space_to_json(space), "settings": settings, "steps": asdict(steps)}
    methods = {"hpo.pruner": asdict(config.pruner), "hpo.sampler": asdict(config.sampler)}
    return json.loads(json.dumps(content)), json.loads(json.dumps(methods))


def _create(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Any],
    config: StudyConfig,
    pruner: BasePruner,
    attributes: dict[str, Any],
) -> optuna.Study:
    """Create or load a study, and write those of its attributes that are new."""
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=directions,
        sampler=optuna.samplers.RandomSampler(config.sampler.seed),  # draws are made by `draw_parameter_set`
        pruner=pruner,
        load_if_exists=True,
    )
    for key, value in attributes.items():
        if study.user_attrs.get(key) != value:
            study.set_user_attr(key, value)
    return study


def _check_options(run_dir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if found := differences(old, new):
        raise StudyError(
            f"{run_dir} holds a study whose trials can't be compared with the requested ones. Differences:\n  "
            + "\n  ".join(found)
            + "\nName another run_dir, or delete that folder."
        )


def _check_methods(run_dir: Path, old: Mapping[str, Any], space: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    if found := differences(old, {"hpo.space": space, **methods}):
        raise StudyError(
            f"other processes are at work on the study in {run_dir}, with other options. Differences:\n  "
            + "\n  ".join(found)
            + "\nStop them first, name another run_dir, or join them with `lightning-bge worker`."
        )


def without(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The options except some."""
    return {name: value for name, value in options.items() if name not in names}


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


# ---------------------------------------------------------------------- a changed search space


def _take_over(old: optuna.Study, name: str, space: Space, configured: Mapping[str, Any], same_steps: bool) -> None:
    """Begin a study with all trials of another one, in their order: their files are found by their numbers.

    One that does not fit counts as failed.
    """
    storage = storage_of(old)
    optuna.create_study(storage=storage, study_name=name, directions=old.directions)
    study_id = storage.get_study_id_from_name(name)
    before = old.user_attrs.get("settings", {})
    for trial in old.get_trials(deepcopy=False):
        storage.create_new_trial(study_id, _fitted(trial, space, before, configured, same_steps))


def _fitted(
    trial: FrozenTrial, space: Space, before: Mapping[str, Any], configured: Mapping[str, Any], same_steps: bool
) -> FrozenTrial:
    """A trial as one of another search space; failed with the reason where it does not fit."""
    values: dict[str, Any] = {}
    for name in space:  # those that others depend on come first
        if is_drawn(space, name, values):
            values[name] = trial.params.get(name, before.get(name))
    other = {
        name: value for name, value in trial.params.items() if name not in values and value != configured.get(name)
    }
    reason = ", ".join(f"{name} is {value}" for name, value in other.items())
    try:
        [params] = parse_enqueued([values], space)
    except ConfigError as error:
        reason = str(error)
    if not same_steps:
        reason = "it reports at other steps"
    if NOT_TRAINED in trial.user_attrs or not trial.state.is_finished():
        reason = "it was not trained"
    if reason:
        return create_trial(state=TrialState.FAIL, user_attrs={NOT_TRAINED: reason})
    return FrozenTrial(
        number=trial.number,
        trial_id=-1,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=params,
        distributions={name: space[name] for name in params},
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )
