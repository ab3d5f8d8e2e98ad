"""The options of a study's trials: which may be searched, and what is refused before a study exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace, dict_to_namespace

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MemoryConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.types import Schema

OPTIONS = {
    "seed_everything": 42,
    "model": {"name_or_path": "m", "task": "binary", "revision": None, "trust_remote_code": False, "dropout": None},
    "data": {"rows": None, "split": {"folds": 2}, "batching": {}},
    "trainer": {"max_epochs": 3},
}


class Data:
    """Validates on other rows where the options say so."""

    schema = Schema("binary", ("no", "yes"), ("text",), 32)

    def __init__(self, rows: Any = None) -> None:
        self.validation_hash = str(rows)

    def setup(self, stage: str) -> None:
        pass


def make(created: list[Namespace], metric: str = "f1", **changes: Any) -> TextExperiment:
    def validate(config: Namespace) -> None:
        if config["model.dropout"] is not None and config["model.dropout"] > 1:
            raise ValueError("dropout above 1")

    def create(config: Namespace) -> TextTrialSetup:
        created.append(config)
        return TextTrialSetup(BGEClassifier("m"), Data(config["data.rows"]), None, None)  # type: ignore[arg-type]

    config = dict_to_namespace(OPTIONS)
    for name, value in changes.items():
        config[name] = value
    return TextExperiment(
        config=config,
        create=create,
        validate=validate,
        plain=lambda config: config.as_dict(),
        datamodule=Data(),  # type: ignore[arg-type]
        monitor=MonitorConfig(metric),
        compile=CompileConfig(),
        memory=MemoryConfig(limit_gb=2.0),
        run_dir=Path("runs/none"),
    )


def test_a_trial_has_its_parameters_and_what_follows_from_them() -> None:
    created: list[Namespace] = []
    make(created).build({"model.dropout": 0.25, "model.name_or_path": "other", "seed_everything": 7})
    [config] = created
    assert (config["model.dropout"], config["data.tokenizer"], config["data.batching.seed"]) == (0.25, "other", 7)
    assert config["trainer.max_epochs"] == 3


def test_both_ends_and_all_enqueued_sets_are_tried() -> None:
    created: list[Namespace] = []
    raw = {"model.dropout": {"low": 0.0, "high": 0.5}}
    hpo = StudyConfig(space=raw, enqueue=[{"model.dropout": 0.25}])
    make(created).check_space(hpo, parse_space(raw))
    assert [config["model.dropout"] for config in created] == [0.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "high", "says"),
    [
        ("model.dropout", 2.0, r"hpo.space: these options do not accept the values .*dropout above 1"),
        ("model.rate", 1.0, r"hpo.space: there is no option model.rate. Options with such a beginning: model.dropout"),
        ("data.tokenizer", 1.0, r"hpo.space: there is no option data.tokenizer"),
    ],
)
def test_an_option_that_can_not_be_searched_is_named(name: str, high: float, says: str) -> None:
    raw = {name: {"low": 0.0, "high": high}}
    with pytest.raises(ConfigError, match=says):
        make([]).check_space(StudyConfig(space=raw), parse_space(raw))


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ({"low": 1, "high": 8}, 8),
        ({"choices": [1, 2]}, 2),  # fewer than are configured
        ({"low": 1, "high": 8, "when": {"model.dropout": 0.1}}, 8),
        ({"low": 1, "high": 2, "when": {"model.dropout": 0.1}}, 3),  # the configured ones, in the other trials
    ],
)
def test_most_epochs_are_the_highest_that_a_trial_may_draw(spec: dict[str, Any], most: int) -> None:
    space = parse_space({"model.dropout": {"choices": [0.0, 0.1]}, "trainer.max_epochs": spec})
    assert make([]).most_epochs(space) == most


def test_epochs_have_to_be_known() -> None:
    space = parse_space({"model.dropout": {"choices": [0.0, 0.1]}})
    assert make([]).most_epochs(space) == 3
    for wrong in (None, 0, -1):
        with pytest.raises(ConfigError, match=rf"trainer.max_epochs: a study needs 1 or more, got {wrong}"):
            make([], **{"trainer.max_epochs": wrong}).most_epochs(space)


def test_what_changes_the_score_is_refused_by_its_name() -> None:
    raw = {"data.split.folds": {"choices": [2, 3]}}
    with pytest.raises(ConfigError, match=r"^hpo.space: data.split.folds can't be searched"):
        make([]).check_space(StudyConfig(space=raw), parse_space(raw))


def test_an_option_that_no_rule_knows_is_refused_where_it_changes_the_validation_rows() -> None:
    raw = {"data.rows": {"choices": [None, "others"]}}
    with pytest.raises(ConfigError, match=r"^hpo.space: data.rows can't be searched: with \{'data.rows': 'others'\}"):
        make([]).check_space(StudyConfig(space=raw), parse_space(raw))
    raw = {"data.rows": {"choices": [None]}}
    make([]).check_space(StudyConfig(space=raw), parse_space(raw))


def test_the_encoder_cache_has_the_limits_of_the_options() -> None:
    assert make([]).encoder_cache(StudyConfig(encoder_cache_gb=0.5)).capacity == 2**29
    assert make([]).encoder_cache(StudyConfig()).capacity == 0
