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
from lightning_bge.hpo.analysis.journal import SPACE, TAKEN_OVER, present_study, study_names
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.config import build_pruner
from lightning_bge.hpo.space.draw import n_parameter_sets
from lightning_bge.hpo.space.parameter_sets import parse_enqueued
from lightning_bge.hpo.space.search_space import Space, is_drawn, parse_space, space_to_json
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.files import FILES
from lightning_bge.hpo.storage.retrying import RecentTrialsPruner, RetryingStorage
from lightning_bge.hpo.storage.study_storage import StudyStorage, open_study_storage
from lightning_bge.hpo.storage.workers import end_lost_trials
from lightning_bge.hpo.trials import COMPUTED_WITH, NOT_TRAINED
from lightning_bge.runtime.compat.optuna import storage_of

CONTENT = " (content)"  # ends the name of an option that stands for what is read, where the study may not have read it


def study_storage(run_dir: Path, config: StudyConfig, *, waits: bool = False) -> StudyStorage:
    """Open where the study of a run folder is kept, as its options say (`open_study_storage`)."""
    return open_study_storage(
        run_dir,
        config.storage,
        config.study_name,
        patience=config.storage_timeout,
        worker_timeout=config.worker_timeout,
        waits=waits,
    )


def open_study(
    place: StudyStorage,
    config: StudyConfig,
    direction: Literal["maximize", "minimize"],
    steps: Steps,
    options: dict[str, Any],
    configured: Mapping[str, Any] | None = None,
    worker: str = "",
    versions: Mapping[str, str] | None = None,
) -> optuna.Study:
    """Create or continue a study. Call it under its lock.

    The study has the name that its folder had at first, or `hpo.study_name`, and the name never changes: Hyperband's
    brackets depend on it. With a changed search space a new study begins in the same storage, which takes over the
    trials that fit into it.

    Args:
        place: where the study is kept.
        config: the options of the study.
        direction: of the score: `maximize` or `minimize`. A cost is the second objective.
        steps: what a trial that runs to its end reports.
        options: those that must be equal for trials to be comparable, by dotted names, as plain data. Names that end
            with `CONTENT` need not be known to each call: the study remembers them, and compares those it knows.
        configured: the configured values of all options, by dotted names: a parameter that is not searched any more
            has them.
        worker: the id of this process among the workers.
        versions: what this process computes with; a new study has them as its attribute `computed_with`.

    Raises:
        ConfigError: the space is wrong; nothing is written.
        StudyError: the place holds a study with other options, or processes are at work on it with another space,
            pruner or sampler; the message lists the differences.
    """
    space = parse_space(config.space)
    pruner = build_pruner(config.pruner, n_parameter_sets(config.n_trials, space), steps)
    storage, run_dir = place.storage, place.run_dir
    # asha reads the trials at its rungs alone, and has to see all of them
    if isinstance(storage, RetryingStorage) and not isinstance(pruner, AshaPruner):
        pruner = RecentTrialsPruner(pruner, storage)
    present = present_study(storage, place.name)
    content, methods = _attributes(config, space, options, steps)
    first = {} if versions is None else {COMPUTED_WITH: dict(versions)}

    def create(name: str) -> optuna.Study:
        directions = [direction] if config.cost is None else [direction, "minimize"]
        return _create(storage, name, directions, config, pruner, content | {"methods": methods} | first)

    if present is None:
        return create(place.name or config.study_name or run_dir.resolve().name)
    old = optuna.load_study(study_name=present, storage=storage)
    if place.name is not None and "settings" not in old.user_attrs and old.get_trials(deepcopy=False):
        raise StudyError(f"{place.shown} was not created by `lightning-bge hpo`. Set another hpo.study_name")
    first = {COMPUTED_WITH: old.user_attrs[COMPUTED_WITH]} if COMPUTED_WITH in old.user_attrs else first
    content["settings"] = _with_known_content(old.user_attrs.get("settings", {}), content["settings"])
    _check_joinable(place, old.user_attrs, content, methods, at_work=bool(place.workers.living() - {worker}))
    if old.user_attrs.get("space", content["space"]) == content["space"]:
        return create(present)
    end_lost_trials(old, place.workers, config.max_worker_deaths)  # else what they had trained would be left out
    study = create(_take_over(old, place.name, space, configured or {}, content["steps"]))
    study.set_user_attr(TAKEN_OVER, True)
    return study


def _attributes(
    config: StudyConfig, space: Space, options: Mapping[str, Any], steps: Steps
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same for trials to be comparable, and what may change while nobody is at work; plain data."""
    settings = {**options, **({} if config.cost is None else {"hpo.cost": config.cost})}
    content = {"space": space_to_json(space), "settings": settings, "steps": asdict(steps)}
    methods: dict[str, Any] = {"hpo.pruner": asdict(config.pruner), "hpo.sampler": asdict(config.sampler)}
    methods["hpo.worker_timeout"] = config.worker_timeout  # who gives signs seldom would count as gone for others
    return json.loads(json.dumps(content)), json.loads(json.dumps(methods))


def _with_known_content(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The requested options with the content that the study knows, and this call does not read."""
    return {name: value for name, value in old.items() if name.endswith(CONTENT) and name not in new} | dict(new)


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


def _check_joinable(
    place: StudyStorage, found: Mapping[str, Any], content: Mapping[str, Any], methods: Mapping[str, Any], at_work: bool
) -> None:
    """Raise StudyError where a study with these attributes must not be continued with the requested ones."""
    old, new = found.get("space", content["space"]), content["space"]
    changed = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    settings = found.get("settings", content["settings"])
    first_read = {name for name in content["settings"] if name.endswith(CONTENT) and name not in settings}
    _check_same(
        without(settings, changed),
        without(content["settings"], changed | first_read),
        f"{place.shown} holds trials that can't be compared with the requested ones",
        "Name another run_dir, or delete that folder" if place.name is None else "Set another hpo.study_name",
    )
    if at_work:
        _check_same(
            {"hpo.space": old, **found.get("methods", methods)},
            {"hpo.space": new, **methods},
            f"other processes are at work on {place.shown}, with other options",
            "Stop them first, name another run_dir or study, or join them with the options of the first",
        )


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], refusal: str, fix: str) -> None:
    """Raise StudyError with the differences of two nested dictionaries of options."""
    if found := differences(old, new):
        raise StudyError("\n  ".join([f"{refusal}. Differences:", *found]) + f"\n{fix}.")


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


def _take_over(
    old: optuna.Study, base: str | None, space: Space, configured: Mapping[str, Any], steps: Mapping[str, int]
) -> str:
    """Begin a study with all trials of another one, in their order: their files are found by their numbers.

    One that does not fit counts as failed; one that did not fit into the other study is taken from an earlier one.
    Returns the name of the study.
    """
    storage, names = storage_of(old), study_names(storage_of(old), base)
    begun = names.index(old.study_name) + 1
    for left in names[begun:]:  # a process that was killed in the middle has left it
        optuna.delete_study(study_name=left, storage=storage)
    name, known = f"{names[0]}{SPACE}{begun + 1}", old.user_attrs
    optuna.create_study(storage=storage, study_name=name, directions=old.directions)
    study_id = storage.get_study_id_from_name(name)
    if FILES in known:
        storage.set_study_user_attr(study_id, FILES, known[FILES])
    for trial, before in _as_trained([*(optuna.load_study(study_name=one, storage=storage) for one in names[:begun])]):
        same_steps = before.get("steps") == steps
        storage.create_new_trial(study_id, _fitted(trial, space, before.get("settings", {}), configured, same_steps))
    return name


def _as_trained(studies: Sequence[optuna.Study]) -> list[tuple[FrozenTrial, dict[str, Any]]]:
    """Each trial of the last study, as the latest study has it in whose space it fits, and that study's attributes."""
    found: list[tuple[FrozenTrial, dict[str, Any]]] = []
    for study in studies:
        attributes = study.user_attrs
        for number, trial in enumerate(study.get_trials(deepcopy=False)):
            if number == len(found):
                found.append((trial, attributes))
            elif NOT_TRAINED not in trial.user_attrs:
                found[number] = trial, attributes
    return found


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
