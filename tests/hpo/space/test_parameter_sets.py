"""What is checked before a study starts, and the enqueued that it tries first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.parameter_sets import complete_parameter_set, parameter_sets_to_check, parse_enqueued
from lightning_bge.hpo.space.search_space import Space, parse_space, suggest
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trials import ENQUEUED
from tests.helpers.study_run import run_study

RAW: dict[str, Any] = {
    "alpha": {"low": 1.0, "high": 4.0, "when": {"lora": True, "model": ["base", "large"]}},
    "lora": {"choices": [False, True]},
    "model": {"choices": ["small", "base", "large"]},
    "length": {"low": 32, "high": 64, "step": 16},
}
CONFIGURED = {"lora": False, "model": "other", "alpha": None, "length": 7}


@pytest.fixture
def space() -> Space:
    return parse_space(RAW)


def checked(space: Space, **configured: Any) -> list[dict[str, Any]]:
    return list(parameter_sets_to_check(space, {**CONFIGURED, **configured}.get))


def test_of_a_plain_space_both_ends_of_each_range_alone() -> None:
    plain = parse_space({name: RAW[name] for name in ("lora", "model", "length")})
    values = [("lora", False), ("lora", True), *(("model", name) for name in RAW["model"]["choices"])]
    assert checked(plain) == [{name: value} for name, value in [*values, ("length", 32), ("length", 64)]]


def test_with_a_conditional_value_go_those_that_it_needs_each_of_them(space: Space) -> None:
    found = [point for point in checked(space) if "alpha" in point]
    assert found == [
        {"lora": True, "model": model, "alpha": alpha} for alpha in (1.0, 4.0) for model in ("base", "large")
    ]


def test_with_a_value_go_those_that_it_brings_along(space: Space) -> None:
    found = checked(space, model="base")
    assert {"lora": True, "alpha": 1.0} in found
    assert {"lora": False} in found
    assert {"lora": True} not in found  # no trial is like that
    assert {"length": 32} in found
    assert complete_parameter_set(space, {"model": "large", "lora": True}, CONFIGURED.get)["alpha"] == 1.0
    assert complete_parameter_set(space, {"model": "large", "lora": True, "alpha": 3.0}, CONFIGURED.get)["alpha"] == 3.0
    assert "alpha" not in complete_parameter_set(space, {"model": "small", "lora": True}, CONFIGURED.get)


def test_a_parameter_that_is_not_drawn_lets_none_be_drawn_whatever_is_configured() -> None:
    raw = {
        "a": {"choices": [1, 2]},
        "b": {"choices": ["x", "y"], "when": {"a": 1}},
        "c": {"low": 0, "high": 1, "when": {"b": "y"}},
    }
    space = parse_space(raw)
    configured = {"a": 2, "b": "y", "c": 5}.get
    assert complete_parameter_set(space, {}, configured) == {}
    assert complete_parameter_set(space, {"a": 1}, configured) == {"a": 1, "b": "x"}
    assert list(parameter_sets_to_check(space, configured))[-2:] == [
        {"a": 1, "b": "y", "c": 0},
        {"a": 1, "b": "y", "c": 1},
    ]


def test_enqueued_are_as_trials_have_them(space: Space) -> None:
    enqueued = parse_enqueued([{"length": 48.0, "model": "small"}, {"lora": True, "model": "base", "alpha": 2}], space)
    assert enqueued == [{"length": 48, "model": "small"}, {"lora": True, "model": "base", "alpha": 2.0}]
    assert [type(enqueued[0]["length"]), type(enqueued[1]["alpha"])] == [int, float]
    assert parse_enqueued([], space) == []


@pytest.mark.parametrize(
    ("enqueued", "says"),
    [
        ({"length": 48}, "expected a list of parameter sets"),
        (["length"], "parameter set 1: expected {name of a searched parameter: value, ...}, got 'length'"),
        ([{}], "parameter set 1: expected {name"),
        (
            [{"length": 48}, {"width": 1}],
            "parameter set 2: width is not searched; searched are lora, model, alpha, length",
        ),
        (
            [{"model": "huge"}],
            r"parameter set 1: model: expected one of the choices \['small', 'base', 'large'\], got 'huge'",
        ),
        ([{"lora": 1}], "expected one of the choices .* got 1"),
        ([{"length": 65}], "length: expected 32 to 64 in steps of 16, got 65; change the value, or the range"),
        ([{"length": 40}], "length: expected 32 to 64 in steps of 16, got 40"),
        ([{"length": 48.5}], "length: expected 32 to 64 in steps of 16, got 48.5"),
        ([{"length": "1e-5"}], "must be a finite number.*write 1.0e-5"),
        ([{"length": True}], "must be a finite number"),
        ([{"length": None}], "must be a finite number"),
        (
            [{"alpha": 2.0}],
            "alpha is drawn only when lora is one of .*, but lora is not given; drop alpha, or change lora",
        ),
        ([{"alpha": 2.0, "lora": False, "model": "base"}], "but lora is False"),
        ([{"alpha": 2.0, "lora": True, "model": "small"}], "model is one of .'base', 'large'., but model is 'small'"),
        ([{"length": 48}, {"lora": True}, {"length": 48.0}], "parameter set 3: equals parameter set 1"),
    ],
)
def test_mistakes_name_parameter_set_and_parameter(space: Space, enqueued: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_enqueued(enqueued, space)
    assert "hpo.enqueue" in str(caught.value)


# ---------------------------------------------------------------------- in a study


def run(folder: Path, trials: int, enqueued: list[dict[str, Any]], sampler: str = "tpe") -> optuna.Study:
    config = StudyConfig(
        n_trials=trials, space=RAW, enqueue=enqueued, pruner=PrunerConfig(name="none"), sampler=SamplerConfig(sampler)
    )
    study = open_study(study_storage(folder, config), config, "maximize", Steps(1, 1), {})

    def objective(trial: optuna.Trial) -> float:
        return float(suggest(trial, parse_space(RAW))["length"])

    run_study(study, objective, config, folder, enqueued=parse_enqueued(enqueued, parse_space(RAW)))
    return study


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_enqueued_are_tried_first_and_what_they_leave_out_is_drawn(tmp_path: Path, sampler: str) -> None:
    enqueued = [{"length": 48, "model": "small"}, {"lora": True, "model": "base", "alpha": 2}]
    study = run(tmp_path, 15, enqueued, sampler)
    first, second, *others = study.trials
    assert first.params.items() >= enqueued[0].items()
    assert first.params.keys() == {"length", "model", "lora"}
    assert second.params.items() >= enqueued[1].items()
    assert second.params["length"] in (32, 48, 64)
    assert first.user_attrs[ENQUEUED] == enqueued[0]
    assert not any(ENQUEUED in trial.user_attrs for trial in others)
    assert len(others) == 13


def test_a_study_that_goes_on_tries_only_new_enqueued(tmp_path: Path) -> None:
    enqueued = [{"length": 48}, {"length": 64}]
    run(tmp_path, 1, enqueued)
    study = run(tmp_path, 1, enqueued)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]
    study = run(tmp_path, 4, [{"length": 32}, *reversed(enqueued)])
    assert [trial.params["length"] for trial in study.trials[:3]] == [48, 32, 64]
    assert [ENQUEUED in trial.user_attrs for trial in study.trials] == [True, True, True, False]


def test_an_enqueued_parameter_set_that_was_drawn_before_is_not_tried_once_more(tmp_path: Path) -> None:
    drawn = run(tmp_path, 3, [], "random").trials[1].params
    study = run(tmp_path, 4, [drawn, {"length": 48}], "random")
    assert [trial.user_attrs.get(ENQUEUED) for trial in study.trials] == [None, None, None, {"length": 48}]


def test_a_wrong_space_creates_no_study(tmp_path: Path) -> None:
    config = StudyConfig(n_trials=1, space={"length": {"low": 64, "high": 32}})
    place = study_storage(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="length"):
        open_study(place, config, "maximize", Steps(1, 1), {})
    assert place.storage.get_all_studies() == []


def test_the_limit_of_waiting_models() -> None:
    assert StudyConfig(space=RAW).encoder_cache_bytes == 0
    assert StudyConfig(space={"model.name_or_path": {"choices": ["a", "b"]}}).encoder_cache_bytes is None
    assert StudyConfig(space=RAW, encoder_cache_gb=1.5).encoder_cache_bytes == 3 * 2**29
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"hpo\.encoder_cache_gb"):
            StudyConfig(encoder_cache_gb=wrong)
