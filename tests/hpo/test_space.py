import json

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space import describe_difference, parse_space, space_to_json, suggest

YAML = """
model.optimizer.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
model.dropout: {low: 0.0, high: 0.3, step: 0.05}
data.batch_size: {choices: [16, 32]}
trainer.max_epochs: {type: int, low: 1, high: 5}
model.width: {low: 2, high: 8, step: 2}
model.scale: {type: float, low: 1, high: 3}
"""


def test_forms():
    space = parse_space(yaml.safe_load(YAML))
    assert space == {
        "model.optimizer.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "model.dropout": FloatDistribution(0.0, 0.3, step=0.05),
        "data.batch_size": CategoricalDistribution((16, 32)),
        "trainer.max_epochs": IntDistribution(1, 5),
        "model.width": IntDistribution(2, 8, step=2),
        "model.scale": FloatDistribution(1, 3),
    }


def test_suggest_draws_what_optuna_stores():
    space = parse_space(yaml.safe_load(YAML))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        values = suggest(trial, space)
        assert list(values) == list(space)
        assert values == trial.params
        assert trial.distributions == space
        assert isinstance(values["trainer.max_epochs"], int)
        assert isinstance(values["model.scale"], float)


def test_whole_floats_with_type_int():
    assert parse_space({"x": {"type": "int", "low": 1.0, "high": 4.0}}) == {"x": IntDistribution(1, 4)}
    assert parse_space({"x": {"low": 1, "high": 4.0}}) == {"x": FloatDistribution(1, 4)}
    assert parse_space({"x": {"low": 0, "high": 1, "step": 0.5}}) == {"x": FloatDistribution(0, 1, step=0.5)}
    assert parse_space({"x": {"choices": [None, True, "a", 0.5]}})["x"] == CategoricalDistribution(
        (None, True, "a", 0.5)
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"low": 2, "high": 1}, "swap the bounds"),
        ({"low": 0, "high": 1.0, "log": True}, "needs low > 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "do not go together"),
        ({"low": 1, "high": 2, "logg": True}, "unknown key 'logg'; known are choices, low, high, step, log, type"),
        ({"low": 1}, "both 'low' and 'high'"),
        ({}, "either 'choices' or both"),
        ({"choices": []}, "at least one value"),
        ({"choices": "ab"}, "must be a list"),
        ({"choices": [[1], [2]]}, r"got \[1\]"),
        ({"choices": [1, True]}, "equals an earlier choice"),
        ({"choices": [float("inf")]}, "must be finite"),
        ({"choices": [1], "low": 1}, "stands alone"),
        ({"low": 0, "high": 1, "step": 0}, "'step' must be above 0"),
        ({"low": 0, "high": 1, "step": -0.5}, "'step' must be above 0"),
        ({"low": 0.0, "high": 1.0, "step": 0.3}, "would be 0.9"),
        ({"low": 0, "high": 9, "step": 2}, "would be 8"),
        ({"low": "1e-5", "high": 1}, "write 1.0e-5"),
        ({"low": True, "high": 1}, "finite number"),
        ({"low": 0, "high": float("inf")}, "finite number"),
        ({"low": 0.5, "high": 1, "type": "int"}, "whole numbers"),
        ({"low": 0, "high": 1, "type": "integer"}, "int or float"),
        ({"low": 1, "high": 2, "log": "yes"}, "true or false"),
        (0.1, "a fixed value is no search"),
    ],
)
def test_mistakes_name_the_parameter(spec, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_space({"fine": {"choices": [1]}, "model.lr": spec})
    assert "hpo.space.model.lr" in str(caught.value)


@pytest.mark.parametrize("raw", [{}, None, [1]])
def test_empty_space(raw):
    with pytest.raises(ConfigError, match="at least one parameter"):
        parse_space(raw)


def test_comparison_survives_a_study(tmp_path):
    space = space_to_json(parse_space(yaml.safe_load(YAML)))
    again = json.loads(json.dumps(space))
    assert again == space
    assert describe_difference(again, space) == ""
    reordered = dict(reversed(yaml.safe_load(YAML).items()))
    assert list(space_to_json(parse_space(reordered))) == list(space)


def test_difference_is_named():
    old = space_to_json(
        parse_space({"a": {"low": 0.0, "high": 1.0}, "b": {"choices": [1]}, "d": {"low": 1, "high": 2}})
    )
    new = space_to_json(parse_space({"a": {"low": 0.0, "high": 2.0}, "c": {"choices": [1]}, "d": {"choices": [1, 2]}}))
    text = describe_difference(old, new).splitlines()
    assert text[0] == "a: high 1.0 -> 2.0"
    assert text[1:3] == ["b: no longer searched", "c: not searched before"]
    assert text[3].startswith("d: type int -> categorical")
