"""Draws of parameter sets: keyed by their ordinal, each set once, by any sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.draw import (
    SamplerConfig,
    all_parameter_sets,
    check_grid,
    draw_parameter_set,
    space_size,
)
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.trials import key_of, one_trial_each

WIDE = parse_space({"lr": {"low": 1e-5, "high": 1e-2, "log": True}, "dropout": {"low": 0.0, "high": 0.5}})
SMALL = parse_space(
    {"a": {"choices": [1, 2, 3]}, "b": {"low": 0.1, "high": 0.4, "step": 0.1}, "c": {"choices": ["x", None]}}
)
CONDITIONAL = parse_space(
    {
        "loss": {"choices": ["bce", "focal"]},
        "gamma": {"low": 1, "high": 3, "when": {"loss": "focal"}},
        "deep": {"choices": [True, False], "when": {"loss": "focal"}},
        "n": {"low": 1, "high": 2},
    }
)


def empty() -> optuna.Study:
    return optuna.create_study(direction="maximize", study_name="s")


def draws(space: Space, config: SamplerConfig, count: int, study: optuna.Study | None = None) -> list[FrozenTrial]:
    """Draw one after another, as one process does; each ends as complete with a value."""
    study = study or empty()
    for _ in range(count):
        trials = study.get_trials(deepcopy=False)
        found = draw_parameter_set(
            study,
            space,
            config,
            seen=one_trial_each(trials),
            ordinal=len(trials),
            taken={key_of(trial.params) for trial in trials},
        )
        if found is None:
            break
        value = math.fsum(one for one in found.params.values() if isinstance(one, float))
        study.add_trial(
            create_trial(
                params=found.params, distributions=found.distributions, system_attrs=found.system_attrs, value=value
            )
        )
    return study.trials


@pytest.mark.parametrize("name", ["random", "tpe", "qmc", "optuna.samplers.NSGAIISampler"])
def test_a_restart_draws_what_would_have_been_drawn_without_it(name: str) -> None:
    whole = [trial.params for trial in draws(WIDE, SamplerConfig(name), 16)]
    study = empty()
    for part in (3, 1, 8, 4):
        draws(WIDE, SamplerConfig(name), part, study)
    assert [trial.params for trial in study.trials] == whole
    assert whole != [trial.params for trial in draws(WIDE, SamplerConfig(name, seed=1), 16)]


def test_random_draws_do_not_depend_on_what_other_processes_have_ended() -> None:
    study, config = empty(), SamplerConfig("random")
    alone = [trial.params for trial in draws(WIDE, config, 4)]
    for ordinal in (2, 0, 3, 1):
        found = draw_parameter_set(study, WIDE, config, seen=[], ordinal=ordinal, taken=set())
        assert found is not None
        assert found.params == alone[ordinal]


def test_tpe_draws_what_a_study_of_optuna_draws_with_that_seed() -> None:
    study = empty()
    draws(WIDE, SamplerConfig("random"), 12, study)
    found = draw_parameter_set(study, WIDE, SamplerConfig("tpe"), seen=study.trials, ordinal=12, taken=set())
    assert found is not None
    other = optuna.create_study(direction="maximize", sampler=SamplerConfig("tpe").build(_seed_of(found, study)))
    other.add_trials(study.trials)
    trial = other.ask()
    expected = {
        "lr": trial.suggest_float("lr", 1e-5, 1e-2, log=True),
        "dropout": trial.suggest_float("dropout", 0, 0.5),
    }
    assert found.params == expected


def _seed_of(found: FrozenTrial, study: optuna.Study) -> int:

    return int(np.random.SeedSequence((42, len(study.trials), 0)).generate_state(1)[0])


@pytest.mark.parametrize("name", ["random", "tpe", "grid", "qmc"])
@pytest.mark.parametrize("space", [SMALL, CONDITIONAL])
def test_each_parameter_set_of_a_finite_space_is_drawn_once(name: str, space: Space) -> None:
    size = int(space_size(space))
    found = draws(space, SamplerConfig(name), size + 3)
    assert len(found) == size
    assert {key_of(trial.params) for trial in found} == {key_of(params) for params in all_parameter_sets(space)}


def test_the_number_of_parameter_sets() -> None:
    assert space_size(SMALL) == 24
    assert space_size(CONDITIONAL) == 2 * (1 + 3 * 2)
    assert len(list(all_parameter_sets(CONDITIONAL))) == 14
    assert math.isinf(space_size(WIDE))
    assert space_size(parse_space({"a": {"low": 2.0, "high": 2.0}, "b": {"low": 1, "high": 9, "step": 2}})) == 5


def test_given_values_are_kept_and_the_others_drawn() -> None:
    study = empty()
    config = SamplerConfig()
    found = draw_parameter_set(study, SMALL, config, seen=[], ordinal=0, taken=set(), given={"a": 2, "b": 0.3})
    assert found is not None
    assert (found.params["a"], found.params["b"]) == (2, 0.3)
    taken = {key_of({"a": 2, "b": 0.3, "c": c}) for c in ("x", None)}
    arguments: dict[str, Any] = {"seen": [], "ordinal": 5, "taken": taken, "given": {"a": 2, "b": 0.3}}
    assert draw_parameter_set(study, SMALL, config, **arguments) is None


def test_true_differs_from_1_and_rounding_makes_no_difference() -> None:
    assert key_of({"a": True}) != key_of({"a": 1})
    assert key_of({"a": "1"}) != key_of({"a": 1})
    assert key_of({"a": 0.1 + 0.2}) == key_of({"a": 0.3})


def test_a_sampler_sees_one_trial_of_each_parameter_set() -> None:
    def trial(number: int, state: TrialState, **attributes: int) -> FrozenTrial:
        found = create_trial(state=state, user_attrs=attributes, value=0.5 if state == TrialState.COMPLETE else None)
        found.number = number
        return found

    paused, complete, running, failed = TrialState.PRUNED, TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL
    trials = [
        trial(0, paused),
        trial(1, failed),
        trial(2, complete, parameter_set=0),
        trial(3, running, parameter_set=1),
        trial(4, paused),
        trial(5, running, parameter_set=4),  # says less than the paused one
    ]
    assert [one.number for one in one_trial_each(trials)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bayes"}, "hpo.sampler.name: expected one of tpe, random, grid, qmc, or the path of a class"),
        ({"name": "optuna.samplers.Nothing"}, "has no attribute 'Nothing'"),
        ({"name": "optuna.pruners.NopPruner"}, "inherits from BaseSampler"),
        ({"name": "no.such.module"}, "No module named 'no'"),
        ({"name": "optuna.samplers.TPESampler", "init_args": {"startup": 1}}, "does not accept"),
        ({"name": "tpe", "init_args": {"n_startup_trials": 1}}, "not used by 'tpe'"),
    ],
)
def test_a_wrong_sampler_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerConfig(**options)


def test_a_grid_needs_a_finite_space() -> None:
    check_grid(SMALL)
    with pytest.raises(ConfigError, match="lr, dropout have no step"):
        check_grid(WIDE)
    with pytest.raises(ConfigError, match="this one has 1,000,000"):
        check_grid(parse_space({name: {"low": 1, "high": 1000} for name in ("a", "b")}))
