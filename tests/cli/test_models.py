"""A search over models and lengths, with conditions and known points, as a user calls it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from lightning_bge.cli import main as cli
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.tiny_bert import build_tiny_bert
from tests.helpers.cli_sample import write_small_sample

LR = {"low": 1.0e-4, "high": 1.0e-2, "log": True}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and two models: the second one knows fewer words, so that the other's token numbers are none of its own."""
    folder = tmp_path_factory.mktemp("sample")
    texts = write_small_sample(folder)
    build_tiny_bert(folder / "one", texts, vocab_size=300, hidden_size=16, layers=1, max_positions=128)
    build_tiny_bert(folder / "other", texts, vocab_size=150, hidden_size=24, layers=1, max_positions=128, seed=1)
    return folder


@pytest.fixture
def options(sample: Path, tmp_path: Path) -> dict[str, Any]:
    data = {
        "train_file": str(sample / "train.csv"),
        "cache_dir": str(tmp_path / "cache"),
        "text_columns": ["text", "criterion"],
        "group_column": "post_id",
        "max_length": 64,
        "split": {"folds": 2},
    }
    return {
        "run_dir": str(tmp_path / "study"),
        "model": {"name_or_path": str(sample / "one")},
        "data": data,
        "trainer": {"precision": "32-true", "max_epochs": 1},
        "hpo": {"n_trials": 1, "sampler": {"name": "random"}, "refit": False, "pruner": {"name": "none"}},
    }


@pytest.fixture
def loads() -> Iterator[list[str]]:
    """The models that were read during the search."""
    found: list[str] = []

    def load(name: str, *args: Any, **options: Any) -> Any:
        found.append(name)
        return load_classifier(name, *args, **options)

    with patch("lightning_bge.models.encoder_cache.load_classifier", load):
        yield found


def search(options: dict[str, Any], **hpo: Any) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `lightning-bge hpo` in this process."""
    path = Path(options["data"]["cache_dir"]).with_name("search.yaml")
    path.write_text(yaml.safe_dump({**options, "hpo": {**options["hpo"], **hpo}}, sort_keys=False))
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = logging.getLogger().handlers[:]
    argv = patch.object(sys, "argv", ["lightning-bge", "hpo", "-c", str(path)])
    with argv, warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            logging.getLogger().handlers[:] = handlers
    return status, out.getvalue(), err.getvalue()


def trials(options: dict[str, Any]) -> list[optuna.trial.FrozenTrial]:
    folder = Path(options["run_dir"])
    return optuna.load_study(study_name=folder.name, storage=open_storage(folder / "journal.log")).trials


@pytest.fixture
def space(sample: Path) -> dict[str, Any]:
    one, other = str(sample / "one"), str(sample / "other")
    return {
        "model.dropout": {"low": 0.1, "high": 0.3, "when": {"model.name_or_path": other}},
        "trainer.max_epochs": {"choices": [2, 3], "when": {"model.name_or_path": [one], "data.max_length": 32}},
        "model.name_or_path": {"choices": [one, other]},
        "data.max_length": {"choices": [32, 64]},
        "model.optimizer.lr": LR,
    }


def test_a_search_over_models_and_lengths_reads_each_model_once(
    options: dict[str, Any], space: dict[str, Any], sample: Path, loads: list[str]
) -> None:
    one, other = str(sample / "one"), str(sample / "other")
    known = [
        {"model.name_or_path": other, "data.max_length": 32, "model.dropout": 0.25, "model.optimizer.lr": 0.002},
        {"model.name_or_path": one, "data.max_length": 32, "trainer.max_epochs": 3},
        {"model.name_or_path": other, "data.max_length": 64},
        {"model.name_or_path": one, "data.max_length": 64},
    ]
    lengths = set()
    setup = TextDataModule.setup

    def seen(self: TextDataModule, stage: str | None = None) -> None:
        setup(self, stage)
        assert self.schema is not None
        lengths.add((self.tokenizer, self.max_length, self.schema.max_length))

    with patch.object(TextDataModule, "setup", seen):
        status, out, err = search(options, n_trials=6, space=space, enqueue=known, refit=True)
    assert status == 0, err
    assert "at most 3 epochs each" in out
    assert lengths == {(name, length, length) for name in (one, other) for length in (32, 64)}
    assert loads == [other, one]

    found = trials(options)
    assert all(trial.params.items() >= point.items() for trial, point in zip(found, known, strict=False))
    for trial in found:
        assert ("model.dropout" in trial.params) == (trial.params["model.name_or_path"] == other)
        both = (trial.params["model.name_or_path"], trial.params["data.max_length"]) == (one, 32)
        assert ("trainer.max_epochs" in trial.params) == both
    # the reports of all trials are of the same number, and 2 folds of 1 epoch are the shortest
    assert {len(trial.intermediate_values) for trial in found} == {6}
    assert [len(trial.user_attrs["curve"][0]) for trial in found[:4]] == [1, 3, 1, 1]

    summary = json.loads((Path(options["run_dir"]) / "summary.json").read_text())
    best = summary["best_params"]
    settings = yaml.safe_load((Path(options["run_dir"]) / "best.yaml").read_text())
    assert settings["model"]["name_or_path"] == best["model.name_or_path"]
    assert settings["model"]["dropout"] == best.get("model.dropout")
    assert settings["trainer"]["max_epochs"] == best.get("trainer.max_epochs", 1)
    # tokenizer and length limit of the exported model are those of the best trial
    model_dir, source = summary["model_dir"], best["model.name_or_path"]
    assert AutoConfig.from_pretrained(model_dir).hidden_size == AutoConfig.from_pretrained(source).hidden_size
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert tokenizer.model_max_length == best["data.max_length"]

    # it goes on, and tries no point again
    loads.clear()
    status, _, err = search(options, n_trials=7, space=space, enqueue=known, refit=False)
    assert status == 0, err
    assert len(trials(options)) == 7
    assert sum("enqueued" in trial.user_attrs for trial in trials(options)) == 4
    # what is configured counts where it is not drawn, and not where it always is
    for section, name, value in (("model", "dropout", 0.2), ("trainer", "max_epochs", 2)):
        changed = {**options, section: {**options[section], name: value}}
        status, _, err = search(changed, n_trials=8, space=space)
        assert status == 2
        assert f"{section}.{name}: {options[section].get(name)} in the folder, {value} requested" in err
    changed = {**options, "model": {"name_or_path": other}, "data": {**options["data"], "max_length": 48}}
    status, _, err = search(changed, n_trials=8, space=space, encoder_cache_gb=0)
    assert status == 0, err


def test_alternating_models_have_the_values_that_each_has_alone(
    options: dict[str, Any], space: dict[str, Any], sample: Path, loads: list[str], tmp_path: Path
) -> None:
    space = {
        name: {"choices": spec["choices"]} for name, spec in space.items() if "model." in name and "choices" in spec
    }
    names = [str(sample / name) for name in ("one", "other", "one", "other")]
    rates = [0.001, 0.001, 0.003, 0.003]
    space["model.optimizer.lr"] = {"choices": [0.001, 0.003]}
    points = [{"model.name_or_path": name, "model.optimizer.lr": rate} for name, rate in zip(names, rates, strict=True)]
    options["monitor"] = {"metric": "loss"}
    values = {}
    for limit, expected in ((1.0, 2), (0.0, 4)):
        loads.clear()
        options["run_dir"] = str(tmp_path / f"study-{expected}")
        more = {"encoder_cache_gb": limit, "baseline": False}
        status, _, err = search(options, n_trials=4, space=space, enqueue=points, **more)
        assert status == 0, err
        values[limit] = [(trial.params, trial.value, trial.intermediate_values) for trial in trials(options)]
        assert len(loads) == expected
    assert values[1.0] == values[0.0]
    assert len({value for _, value, _ in values[1.0]}) == 4


def test_every_trial_has_its_own_hyperparameters(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    build = TextExperiment.build

    def record(experiment: TextExperiment, overrides: dict[str, Any]) -> TextTrialSetup:
        setup = build(experiment, overrides)
        found.append(dict(setup.model.hparams))
        assert setup.datamodule.hparams["batch_size"] == overrides.get("data.batch_size", 32)
        return setup

    monkeypatch.setattr(TextExperiment, "build", record)
    space = {"model.optimizer.lr": LR, "model.dropout": {"low": 0.0, "high": 0.3}, "data.batch_size": {"choices": [16]}}
    status, _, err = search(options, n_trials=3, space=space)
    assert status == 0, err
    names = [(trial.params["model.optimizer.lr"], trial.params["model.dropout"]) for trial in trials(options)]
    assert len(set(names)) == 3
    built = [(each["optimizer"]["lr"], each["dropout"]) for each in found]
    assert [pair for pair in dict.fromkeys(built) if pair in names] == names


def test_values_are_checked_together_with_those_that_they_need(options: dict[str, Any]) -> None:
    options["model"]["frozen_layers"] = 1
    lora = {"choices": [None, 2]}
    frozen = {"choices": [None], "when": {"model.lora.r": 2}}
    status, _, err = search(options, space={"model.lora.r": lora})
    assert status == 2
    assert "set one of them to null" in err
    status, _, err = search(options, space={"model.frozen_layers": frozen, "model.lora.r": lora})
    assert status == 0, err
    # a condition does not hide a value that is wrong even so
    wrong = {"choices": [None, -1], "when": {"model.lora.r": 2}}
    status, _, err = search(options, space={"model.frozen_layers": wrong, "model.lora.r": lora})
    assert status == 2
    assert "frozen_layers must be 0 or more, or null, got -1" in err


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "condition": (
        {"model.dropout": {"low": 0, "high": 0.1, "when": {"model.name": "x"}}},
        "model.name is not searched",
    ),
    "unknown": ([{"model.optimizer.rate": 1}], "parameter set 1: model.optimizer.rate is not searched"),
    "outside": (
        [{"model.optimizer.lr": 1.0e-3}, {"model.optimizer.lr": 1.0}],
        "parameter set 2: model.optimizer.lr: expected",
    ),
    "not drawn": ([{"model.dropout": 0.2}], "model.dropout is drawn only when data.max_length is one of [32]"),
    # each of the two alone is right
    "together": ([{"model.lora.r": 2, "model.frozen_layers": 1}], "set one of them to null"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_one_clear_message_and_leaves_nothing(options: dict[str, Any], mistake: str) -> None:
    wrong, message = MISTAKES[mistake]
    space: dict[str, Any] = {
        "model.optimizer.lr": LR,
        "data.max_length": {"choices": [32, 64]},
        "model.dropout": {"low": 0.1, "high": 0.3, "when": {"data.max_length": 32}},
        "model.lora.r": {"choices": [None, 2]},
        "model.frozen_layers": {"choices": [None, 1]},
    }
    enqueue = [] if isinstance(wrong, dict) else wrong
    status, out, err = search(options, space={**space, **(wrong if isinstance(wrong, dict) else {})}, enqueue=enqueue)
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
    assert not Path(options["run_dir"]).exists()
