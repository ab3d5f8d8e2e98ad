"""Nested cross-validation as a whole: inner studies before the final one, interrupted, continued and refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError, DataError, StudyError
from lightning_bge.hpo import outer_folds
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.outer_folds import run_studies
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.outer_fold import OUTER_ROWS
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.locations import file_sizes
from lightning_bge.runtime.run_folder import create_run_dir
from lightning_bge.trainer import BGETrainer
from lightning_bge.tuning import TuneResult, tune
from tests.helpers.memory_location import memory_location
from tests.helpers.small_search import write_files

SPACE = {"model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True)}
FITS = 2 + 1  # of each study: a trial of two folds, and the refit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("nested"))


def nested(folder: Path, run_dir: Path, **changes: Any) -> TuneResult:
    options: dict[str, Any] = {"n_trials": 1, "max_epochs": 1, "outer_folds": 2, **changes}
    options = {"pruner": {"name": "none"}, "baseline": False, **options}
    paths = {"train_file": str(folder / "train.csv"), "cache_dir": str(folder / "cache"), **options.pop("paths", {})}
    split = options.pop("split", {"folds": 2})
    data = TextDataModule(str(folder / "model"), **paths, max_length=32, batch_size=8, split=split)
    trainer = {"precision": "32-true", "accelerator": "cpu"}
    return tune(BGEClassifier(str(folder / "model")), data, SPACE, run_dir=run_dir, trainer=trainer, **options)


class Fits:
    """How many trainings of folds and refits have begun; Ctrl-C comes as number `stop_at` begins."""

    begun = 0
    stop_at: int | None = None


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    fit, found = BGETrainer.fit, Fits()

    def counted(self: BGETrainer, *args: Any, **options: Any) -> None:
        found.begun += 1
        if found.begun == found.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        fit(self, *args, **options)

    monkeypatch.setattr(BGETrainer, "fit", counted)
    return found


@pytest.fixture(scope="module")
def uninterrupted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nested(files, tmp_path_factory.mktemp("uninterrupted") / "study").run_dir


def results(run_dir: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    found: dict[str, Any] = {"nested.csv": (run_dir / "nested.csv").read_text()}
    for folder in (run_dir, run_dir / "outer_folds" / "0", run_dir / "outer_folds" / "1"):
        summary = json.loads((folder / "summary.json").read_text())
        for name in (
            "wall_seconds",
            "model_dir",
            "n_runs",
            "best_trial",
            "n_interrupted",
        ):  # a stopped trial is one more
            del summary[name]
        del summary["refit"]["threshold_source"]  # names the best trial
        weights = load_file(folder / "model" / "model.safetensors")
        name = str(folder.relative_to(run_dir))
        found |= {name: summary, f"{name}/oof.csv": (folder / "oof.csv").read_text()}
        found |= {f"{name}/{key}": value.numpy().tobytes() for key, value in weights.items()}
    return found


def test_each_row_is_predicted_once_by_a_model_that_has_not_seen_it(uninterrupted: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    with (uninterrupted / "nested.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == list(range(40))
    for number in (0, 1):
        with (uninterrupted / "outer_folds" / str(number) / "oof.csv").open(newline="") as file:
            seen = {int(line["row"]) for line in csv.DictReader(file)}
        scored = {int(line["row"]) for line in lines if line["outer_fold"] == str(number)}
        assert (len(seen), seen | scored, seen & scored) == (20, set(range(40)), set())
        inner = json.loads((uninterrupted / "outer_folds" / str(number) / "summary.json").read_text())
        found = summary["nested"]["folds"][number]
        assert found["best_params"] == inner["best_params"]
        assert (found["epochs"], found["threshold"]) == (inner["refit"]["epochs"], inner["threshold"])
        assert found["value"] == pytest.approx(inner["test"]["f1"])
    value = f1_score([line["truth"] == "1" for line in lines], [line["label"] == "1" for line in lines])
    assert summary["nested"]["value"] == pytest.approx(value)
    assert summary["nested"]["low"] <= value <= summary["nested"]["high"]
    assert summary["nested"]["n_outer_folds"] == 2


@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(FITS + 1, id="in a trial"), pytest.param(2 * FITS, id="in a refit", marks=pytest.mark.slow)],
)
def test_a_stopped_inner_study_is_continued_and_a_finished_one_is_not_repeated(
    files: Path, tmp_path: Path, uninterrupted: Path, fits: Fits, stop_at: int
) -> None:
    fits.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        nested(files, tmp_path / "study")
    assert fits.begun == stop_at  # nothing begins after the stop
    assert (tmp_path / "study" / "outer_folds" / "0" / "summary.json").is_file()
    assert not (tmp_path / "study" / "outer_folds" / "1" / "summary.json").exists()
    fits.stop_at = None
    found = nested(files, tmp_path / "study")
    assert fits.begun == 3 * FITS + 1  # only the stopped one has begun twice
    assert results(found.run_dir) == results(uninterrupted)
    again = nested(files, tmp_path / "study")
    assert fits.begun == 3 * FITS + 1
    assert again.summary == {"schema_version": 1, **(found.summary or {})}


def test_a_machine_with_a_run_folder_of_its_own_finds_the_results_of_all_studies(
    files: Path, tmp_path: Path, uninterrupted: Path, fits: Fits
) -> None:
    at, here, there = memory_location(), tmp_path / "here" / "study", tmp_path / "there" / "study"
    found = nested(files, here, files=str(at))
    assert results(found.run_dir) == results(uninterrupted)
    for name in (".", "outer_folds/0", "outer_folds/1"):  # as if the journals were a database
        (there / name).mkdir(parents=True)
        shutil.copy(here / name / "journal.log", there / name)
    again, begun = nested(files, there, files=str(at)), fits.begun
    assert begun == 3 * FITS
    assert again.summary is not None
    assert again.summary["nested"] == (found.summary or {})["nested"]
    assert (there / "nested.csv").read_text() == (here / "nested.csv").read_text()
    published = file_sizes(at)
    for inner in ("outer_folds/0", "outer_folds/1"):
        assert {f"{inner}/{name}" for name in ("files.id", "summary.json", OUTER_ROWS)} <= published.keys()
        assert not {path.name for path in (there / inner).iterdir()} & {"oof", "checkpoints", "model"}
    options = yaml.safe_load((here / "outer_folds" / "1" / "config.yaml").read_text())
    assert options["hpo"]["files"] == f"{at}/outer_folds/1"


def test_nested_cross_validation_can_follow_a_finished_study_and_scores_models_even_without_a_refit_at_the_end(
    files: Path, tmp_path: Path, fits: Fits, capsys: pytest.CaptureFixture[str]
) -> None:
    first = nested(files, tmp_path / "study", outer_folds=None, refit=False)
    assert first.summary is not None
    assert first.summary["nested"] is None
    assert "nested cross" not in capsys.readouterr().out
    found = nested(files, tmp_path / "study", refit=False)
    assert fits.begun == 3 * FITS - 1  # nothing of the first study is repeated
    assert found.summary is not None
    assert found.model_dir is None
    assert found.summary["nested"]["value"] is not None
    for number in (0, 1):  # what a worker that joins an inner study reads
        folder = tmp_path / "study" / "outer_folds" / str(number)
        options = yaml.safe_load((folder / "config.yaml").read_text())
        assert {name: options["hpo"][name] for name in ("refit", "baseline", "outer_folds")} == {
            **{"refit": True, "baseline": False, "outer_folds": None}
        }
        assert options["data"]["split"]["outer_fold"] == number
    out = capsys.readouterr().out
    price = "nested cross-validation: 2 inner studies before the final one, about 3 times the hours"
    assert out.index(price) < out.index("[1/1]")
    assert "price: 2 inner studies, about 3 times the hours" in out


def test_another_number_of_outer_folds_is_refused(files: Path, uninterrupted: Path) -> None:
    says = r"outer_folds/0 holds trials(?s:.*)data.split.outer_folds: 2 in the folder, 4 requested"
    with pytest.raises(StudyError, match=says):
        nested(files, uninterrupted, outer_folds=4)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"outer_folds": 1}, ConfigError, "^outer_folds: expected 2 or more, got 1"),
        (
            {"paths": {"val_file": "train.csv"}, "split": {"folds": 1}},
            ConfigError,
            "^outer_folds: expected null with data.val_file, got 2.*Leave out data.val_file",
        ),
        (
            {"split": {"folds": 2, "outer_folds": 2, "outer_fold": 0}},
            ConfigError,
            "^outer_folds: expected null with data.split.outer_fold=0, got 2",
        ),
        ({"outer_folds": 30}, DataError, "in 20 rows, too few for 30 parts that all need it: change outer_folds"),
        ({"split": {"folds": 11}}, DataError, "class '0' is in 10 rows, too few for 11 parts"),  # inner folds
    ],
)
def test_what_can_not_be_nested_is_refused_before_anything_is_written(
    files: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    if "val_file" in changes.get("paths", {}):
        changes = {**changes, "paths": {"val_file": str(files / "train.csv")}}
    with pytest.raises(error, match=says):
        nested(files, tmp_path / "study", **changes)
    assert not (tmp_path / "study").exists()


def test_each_study_has_its_part_of_the_time_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [outer_folds._timeout(120.0, 4, done, elapsed) for done, elapsed in ((0, 0), (1, 0), (2, 60), (3, 200))]
    assert times == [30, 40, 30, 30]  # the first was finished before; the last one has its part though all is over
    assert outer_folds._timeout(None, 4, 0, 0.0) is None


def test_an_inner_study_that_others_still_run_leaves_the_rest_to_them(files: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, bool]] = []

    def run(experiment: TextExperiment, hpo: StudyConfig, *, joins: bool) -> tuple[optuna.Study, dict[str, Any] | None]:
        asked.append((experiment.run_dir.name, joins))
        return optuna.create_study(), None if len(asked) == 2 else {}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lightning_bge.tuning.run_studies", lambda e, h: run_studies(e, h, run=run))
        found = nested(files, create_run_dir(tmp_path / "study"))
    assert asked == [("0", False), ("1", False)]  # the final study is not begun
    assert found.summary is None
    assert found.study.study_name == "study"
