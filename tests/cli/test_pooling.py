"""`model.pooling` from the command line to an exported model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_models import small_model, word_tokenizer

Run = Callable[..., tuple[int, str, str]]


def test_a_run_that_pools_by_the_mean_predicts_what_it_has_scored(
    sample: Path, options: list[str], tmp_path: Path, run: Run
) -> None:
    test = ("--data.test_file", str(sample / "test.csv"))
    status, _, err = run("fit", *options, *test, "--model.pooling", "mean")
    assert status == 0, err
    folder, out = tmp_path / "study", tmp_path / "predicted.csv"
    model = ("--model.name_or_path", str(folder / "model"))
    predict = ("predict", *options, *model, "--data.predict_file", str(sample / "test.csv"), "--output", str(out))
    status, _, err = run(*predict)
    assert (status, "`lightning_bge`" in err) == (0, False), err
    with (folder / "test.csv").open() as left, out.open() as right:
        expected, found = ([float(row["score"]) for row in csv.DictReader(file)] for file in (left, right))
    assert found == pytest.approx(expected, abs=1e-4)
    out.unlink()
    status, _, err = run(*predict, "--model.pooling", "cls")
    assert status == 2
    assert "has a head that was trained with mean pooling. Set model.pooling to auto or mean" in err


def test_pooling_is_searched_and_the_winner_exported(search: list[str], tmp_path: Path, run: Run) -> None:
    space = json.dumps({"model.pooling": {"choices": ["mean", "max"]}})
    status, _, err = run(*search, "--hpo.space", space, "--hpo.n_trials", "2", "--hpo.baseline", "false")
    assert status == 0, err
    config = json.loads((tmp_path / "study" / "model" / "config.json").read_text())
    winner = json.loads((tmp_path / "study" / "summary.json").read_text())["best_params"]["model.pooling"]
    assert (config["model_type"], config["lightning_bge_pooling"]) == ("lightning_bge", winner)


@pytest.mark.parametrize("command", ["fit", "hpo"])
def test_an_architecture_that_can_not_pool_so_is_one_line(
    options: list[str], search: list[str], tmp_path: Path, run: Run, command: str
) -> None:
    small_model("mpnet").save_pretrained(tmp_path / "mpnet")
    word_tokenizer().save_pretrained(tmp_path / "mpnet")
    model = ("--model.name_or_path", str(tmp_path / "mpnet"), "--model.pooling", "mean")
    status, _, err = run(*(search if command == "hpo" else ["fit", *options]), *model)
    assert status == 2
    assert "model.pooling: expected auto, as this model is a mpnet" in err.strip().splitlines()[-1]
    assert not (tmp_path / "study").exists()
