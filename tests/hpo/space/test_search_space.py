import json

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.search_space import parse_space, requirements, space_to_json, suggest
from lightning_bge.hpo.study import differences

YAML = """
model.optimizer.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
model.dropout: {low: 0.0, high: 0.3, step: 0.05}
data.batch_size: {choices: [16, 32]}
trainer.max_epochs: {type: int, low: 1, high: 5}
model.width: {low: 2, high: 8, step: 2}
model.scale: {type: float, low: 1, high: 3}
"""

CONDITIONAL = """
rank: {low: 2, high: 8, when: {lora: true}}
alpha: {low: 1.0, high: 4.0, when: {lora: true, model: [large, base]}}
lora: {choices: [true, false], when: {model: [base, large]}}
lr: {low: 1.0e-5, high: 1.0e-3, log: true}
model: {choices: [small, base, large]}
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
        ({"low": 1, "high": 2, "log": True, "step": 1}, "exclude each other"),
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
        (0.1, "set a fixed value as an ordinary option"),
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


@pytest.mark.parametrize("text", [YAML, CONDITIONAL])
def test_the_plain_space_is_equal_after_json_and_is_parsed_as_the_same_space(text):
    space = parse_space(yaml.safe_load(text))
    plain = space_to_json(space)
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain) == sorted(space)
    parsed = parse_space(plain)
    assert (parsed, parsed.when) == (space, space.when)
    assert space_to_json(parse_space(dict(reversed(yaml.safe_load(text).items())))) == plain


def test_differences_of_spaces_are_named():
    old = space_to_json(
        parse_space({"a": {"low": 0.0, "high": 1.0}, "b": {"choices": [1]}, "d": {"low": 1, "high": 2}})
    )
    new = space_to_json(parse_space({"a": {"low": 0.0, "high": 2.0}, "c": {"choices": [1]}, "d": {"choices": [1, 2]}}))
    assert differences(old, old) == []
    assert differences({"hpo.space": old}, {"hpo.space": new}) == [
        "hpo.space.a.high: 1.0 in the folder, 2.0 requested",
        "hpo.space.b: {'choices': [1]} in the folder, None requested",
        "hpo.space.c: None in the folder, {'choices': [1]} requested",
        "hpo.space.d.choices: None in the folder, [1, 2] requested",
        "hpo.space.d.high: 2 in the folder, None requested",
        "hpo.space.d.low: 1 in the folder, None requested",
        "hpo.space.d.step: 1 in the folder, None requested",
        "hpo.space.d.type: int in the folder, None requested",
    ]


def test_parents_come_first_and_all_else_stays_in_its_order():
    space = parse_space(yaml.safe_load(CONDITIONAL))
    assert list(space) == ["lr", "model", "lora", "rank", "alpha"]
    assert space.when == {
        "rank": {"lora": (True,)},
        "alpha": {"lora": (True,), "model": ("base", "large")},  # in the order of the choices
        "lora": {"model": ("base", "large")},
    }
    assert requirements(space, "rank") == {"model": ("base", "large"), "lora": (True,)}
    assert requirements(space, "lr") == {}


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_a_conditional_parameter_is_drawn_where_its_conditions_hold(sampler):
    space = parse_space(yaml.safe_load(CONDITIONAL))
    study = optuna.create_study(sampler=sampler(seed=0))
    seen = set()
    for _ in range(40):
        trial = study.ask()
        values = suggest(trial, space)
        assert values == trial.params
        assert ("lora" in values) == (values["model"] != "small")
        assert ("rank" in values) == ("alpha" in values) == (values.get("lora") is True)
        seen.add(len(values))
        study.tell(trial, values["lr"] * 100 + values.get("rank", 5) / 10)
    assert seen == {2, 3, 5}


def test_a_single_value_is_a_list_of_one_and_numbers_are_no_booleans():
    one = parse_space({"a": {"choices": [1, 2]}, "b": {"low": 0, "high": 1, "when": {"a": 2.0}}})
    assert one.when == {"b": {"a": (2,)}}
    assert one.when == parse_space({"a": {"choices": [1, 2]}, "b": {"low": 0, "high": 1, "when": {"a": [2]}}}).when
    nothing = parse_space({"a": {"choices": [None, 2]}, "b": {"low": 0, "high": 1, "when": {"a": None}}})
    assert nothing.when == {"b": {"a": (None,)}}


OTHERS = {"a": {"choices": [1, 2]}, "c": {"choices": ["x", "y"], "when": {"a": 1}}, "r": {"low": 0, "high": 1}}


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"b": {"when": {"q": 1}}}, "b.when", "q is not searched; name one of a, c, r, b"),
        ({"b": {"when": {"r": 0}}}, "b.when", "r is a range.*on parameters with 'choices' only"),
        ({"b": {"when": {"a": 3}}}, "b.when.a", r"expected one of the choices \[1, 2\], got 3"),
        ({"b": {"when": {"a": [1, 3]}}}, "b.when.a", "got 3"),
        ({"b": {"when": {"a": True}}}, "b.when.a", "got True"),
        ({"b": {"when": {"a": "1"}}}, "b.when.a", "got '1'"),
        ({"b": {"when": {"a": []}}}, "b.when.a", "is never drawn"),
        ({"b": {"when": {}}}, "b.when", "expected {name of another parameter"),
        ({"b": {"when": "a"}}, "b.when", "expected {name of another parameter"),
        ({"b": {"when": None}}, "b.when", "expected {name of another parameter"),
        ({"b": {"when": {"c": "x", "a": 2}}}, "b.when", r"is never drawn: a would have to be one of \[2\] and .*\[1\]"),
        ({"b": {"when": {"b": 1}}}, "hpo.space", "form a cycle: b <- b"),
        (
            {"b": {"when": {"c": "x"}}, "a": {"choices": [1, 2], "when": {"b": 1}}},
            "hpo.space",
            "cycle: a <- b <- c <- a",
        ),
        (
            {"b": {"low": 0, "high": 1, "choices": [1], "when": {"a": 1}}},
            "b",
            "stands alone, got low, high, choices as",
        ),
        ({"b": {"low": 0, "when": {"a": 1}}}, "b", "both 'low' and 'high'"),
    ],
)
def test_mistakes_in_conditions_name_the_parameter(changes, where, says):
    raw = {**OTHERS, **{name: {"choices": [1, 2], **spec} for name, spec in changes.items()}}
    if "low" in changes["b"]:
        raw["b"] = changes["b"]
    with pytest.raises(ConfigError, match=says) as caught:
        parse_space(raw)
    assert where in str(caught.value)


def test_conditions_are_compared():
    space = space_to_json(parse_space(yaml.safe_load(CONDITIONAL)))
    assert space["alpha"]["when"] == {"lora": [True], "model": ["base", "large"]}
    assert space["model"] == {"choices": ["small", "base", "large"]}
    reordered = yaml.safe_load(CONDITIONAL.replace("[large, base]", "[base, large]"))
    assert differences(space, space_to_json(parse_space(reordered))) == []
    changed = parse_space(yaml.safe_load(CONDITIONAL.replace("high: 8, when: {lora: true}", "high: 8")))
    assert differences(space, space_to_json(changed)) == ["rank.when: {'lora': [True]} in the folder, None requested"]
