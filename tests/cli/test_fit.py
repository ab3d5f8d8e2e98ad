"""`fit`: which epoch is exported, going on, dry runs, and what it says of the result."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--model.optimizer.lr", "1e-3", "--trainer.enable_progress_bar", "false")


@pytest.fixture
def fit(run: Run, options: list[str]) -> Run:
    def call(*args: str) -> tuple[int, str, str]:
        return run("fit", *options, *QUICK, *args)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "study"


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def ok(found: tuple[int, str, str]) -> str:
    status, out, err = found
    assert status == 0, err
    return out


# ---------------------------------------------------------------------- callbacks of the user's


def callbacks(tmp_path: Path, *given: tuple[str, dict[str, Any]]) -> list[str]:
    path = tmp_path / "callbacks.yaml"
    listed = [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": args} for name, args in given]
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    return ["-c", str(path)]


WORST = ("ModelCheckpoint", {"monitor": "val_loss", "mode": "max", "save_top_k": 1})
BEST = ("ModelCheckpoint", {"monitor": "val_loss", "mode": "min"})
STOPPING = ("EarlyStopping", {"monitor": "val_loss", "mode": "min", "patience": 5})


@pytest.mark.parametrize("given", [[WORST], [BEST, STOPPING], [WORST, ("LearningRateMonitor", {})]])
def test_the_own_checkpoint_decides_what_is_exported(fit: Run, tmp_path: Path, folder: Path, given: list[Any]) -> None:
    """The loss falls in each epoch, so that the user's checkpoint of the highest loss is that of the first epoch."""
    args = ["--trainer.max_epochs", "3", "--monitor.metric", "loss", "--monitor.patience", "5"]
    ok(fit(*args, *callbacks(tmp_path, *given)))
    assert summary_of(folder)["epoch"] == 3
    assert list((folder / "logs" / "version_0" / "checkpoints").glob("*.ckpt"))  # the user's is there as well
    ok(fit(*args, "--run_dir", str(tmp_path / "plain")))
    plain, found = weights(tmp_path / "plain"), weights(folder)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing: expected true for fit, got false"),
        (["--trainer.barebones", "true"], "trainer.barebones: expected false"),
    ],
)
def test_what_a_run_can_not_do_without(fit: Run, folder: Path, args: list[str], message: str) -> None:
    status, _, err = fit(*args)
    assert status == 2
    assert message in err
    assert not folder.exists()


def test_a_callback_with_a_device_is_written_and_read_again(fit: Run, tmp_path: Path, folder: Path) -> None:
    ok(fit(*callbacks(tmp_path, ("EMAWeightAveraging", {"decay": 0.5, "device": "cpu"}))))
    assert "is finished" in ok(fit("-c", str(folder / "config.yaml")))


def test_scores_are_those_of_the_averaged_weights_that_are_exported(fit: Run, tmp_path: Path, folder: Path) -> None:
    """Also where the best epoch is not the last one, whose average the callback still holds."""
    wild = ("--model.optimizer.lr", "0.05", "--monitor.metric", "loss")
    given = callbacks(tmp_path, ("EMAWeightAveraging", {"decay": 0.5}))
    ok(fit(*given, *wild, "--trainer.max_epochs", "4"))
    summary = summary_of(folder)
    assert summary["epoch"] < 4
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    exported = weights(folder)
    assert all(torch.equal(value, best[f"net.model.{name}"]) for name, value in exported.items())
    with (folder / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert summary["validation"]["loss"] == pytest.approx(losses[summary["epoch"] - 1], rel=1e-5)


def test_clipping_and_accumulation_of_the_trainer(fit: Run, folder: Path) -> None:
    def steps() -> int:
        return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])

    ok(fit("--data.batch_size", "8", "--trainer.max_epochs", "1"))
    before = steps()
    shutil.rmtree(folder)
    options = ("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5")
    ok(fit("--data.batch_size", "8", "--trainer.max_epochs", "1", *options))
    assert steps() == -(-before // 2)


def test_a_checkpoint_among_those_of_the_run_is_refused(fit: Run, tmp_path: Path, folder: Path) -> None:
    given = ("ModelCheckpoint", {"dirpath": str(folder / "checkpoints"), "save_weights_only": True, "save_last": True})
    status, _, err = fit(*callbacks(tmp_path, given))
    assert status == 2
    assert "where the run keeps its own checkpoints. Name another folder" in err


def test_a_metric_that_is_not_logged_is_named(fit: Run, tmp_path: Path) -> None:
    for name in ("EarlyStopping", "ModelCheckpoint"):
        status, _, err = fit(*callbacks(tmp_path, (name, {"monitor": "val_nothing"})))
        assert status == 2
        assert "val_nothing" in err.strip().splitlines()[-1]
        assert "Traceback" not in err
    # nothing has been kept of it, so that a correct one may begin in its place
    ok(fit(*callbacks(tmp_path, STOPPING)))


def test_a_run_without_a_logger_ends_as_one_with_it(fit: Run, folder: Path) -> None:
    ok(fit("--trainer.logger", "false"))
    assert (folder / "model").is_dir()
    assert not (folder / "logs").exists()
    assert (folder / "report.html").is_file()


# ---------------------------------------------------------------------- going on


SAME = [
    ["--trainer.enable_progress_bar", "true"],
    ["--trainer.enable_model_summary", "true"],
    ["--trainer.log_every_n_steps", "3"],
    ["--data.batching.num_workers", "1"],
    ["--compile.mode", "max-autotune"],
    ["--data.table.format", "csv"],
    ["--data.table.labels", "[0, 1]"],
    ["--trainer.callbacks", '[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]'],
    ["--trainer.accelerator", "cpu"],
]
OTHER = [
    (["--model.optimizer.lr", "2e-3"], "model.optimizer.lr: 0.001 in the folder, 0.002 requested"),
    (["--data.table.labels", "[1, 0]"], "labels: ['0', '1'] in the folder, ['1', '0'] requested"),
    (["--data.table.max_rows", "80"], "data_hash: "),
    (["--trainer.max_time", "01:00:00:00"], "trainer.max_time: None in the folder"),  # it may end a run earlier
    (["--data.batch_size", "8"], "data.batch_size: 32 in the folder, 8 requested"),
    (["--trainer.max_epochs", "1"], "trainer.max_epochs: 2 in the folder, 1 requested"),
    (["--trainer.callbacks", '[{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",'
      ' "init_args": {"decay": 0.5}}]'], "trainer.callbacks: [] in the folder"),
]  # fmt: skip


def test_what_does_not_change_the_result_does_not_stand_in_the_way(
    fit: Run, sample: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(fit())
    first = summary_of(folder)
    for args in SAME:
        assert "is finished" in ok(fit(*args)), args
    # other paths of the same content
    shutil.copy(sample / "train.csv", tmp_path / "moved.csv")
    monkeypatch.chdir(sample)
    for args in (
        ["--data.train_file", "train.csv", "--model.name_or_path", "model"],
        ["--data.train_file", str(tmp_path / "moved.csv")],
    ):
        assert "is finished" in ok(fit(*args)), args
    for args, message in OTHER:
        status, _, err = fit(*args)
        assert status == 2
        assert message in err
        assert "holds another run" in err
    assert summary_of(folder) == first


def test_files_for_validation_and_test_are_compared_by_content(
    fit: Run, sample: Path, tmp_path: Path, folder: Path
) -> None:
    rows = (sample / "test.csv").read_text().splitlines()
    for name, lines in {"a.csv": rows, "b.csv": rows, "other.csv": [*rows[:-2], rows[-1]]}.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    paths = {name: str(tmp_path / f"{name}.csv") for name in ("a", "b", "other")}
    ok(fit("--data.val_file", paths["a"], "--data.test_file", paths["a"]))
    assert "is finished" in ok(fit("--data.val_file", paths["b"], "--data.test_file", paths["b"]))
    status, _, err = fit("--data.val_file", paths["other"])
    assert status == 2
    assert "val_hash: " in err
    status, _, err = fit("--data.val_file", paths["a"], "--data.test_file", paths["other"])
    assert status == 2
    assert "its scores are of another test file" in err
    assert f"`lightning-bge test --model.name_or_path {folder / 'model'}`" in err


def test_a_test_file_that_comes_later_is_not_scored_and_that_is_said(fit: Run, sample: Path, folder: Path) -> None:
    ok(fit())
    out = ok(fit("--data.test_file", str(sample / "test.csv")))
    assert "data.test_file is not scored" in out
    assert "test" not in summary_of(folder)


def test_a_finished_run_goes_on_with_more_epochs(fit: Run, sample: Path, folder: Path, tmp_path: Path) -> None:
    test = ["--data.test_file", str(sample / "test.csv"), "--monitor.objective", "last"]
    constant = ["--model.schedule.name", "constant"]
    ok(fit(*test, *constant, "--trainer.max_epochs", "1"))
    out = ok(fit(*test, *constant, "--trainer.max_epochs", "3"))
    said = "going on from 1 to 3 epochs: from here on the learning rate is that of its constant schedule; the test file"
    assert said in out
    assert "resuming from" in out
    assert summary_of(folder)["epoch"] == 3
    assert summary_of(folder)["test"]
    # with a constant rate, and no warm-up in the second epoch, it is the same as three epochs at once
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert "is finished" in ok(fit(*test, *constant, "--trainer.max_epochs", "3"))


def test_what_becomes_of_the_schedule_is_said(fit: Run) -> None:
    ok(fit("--trainer.max_epochs", "1"))
    assert "the learning rate is that of a schedule of 2 epochs\n" in ok(fit("--trainer.max_epochs", "2"))


def test_a_run_whose_schedule_has_ended_says_that_the_rate_is_0(fit: Run) -> None:
    schedule = ["--model.schedule.epochs", "1"]
    ok(fit(*schedule, "--trainer.max_epochs", "1"))
    assert "of 1 epochs (model.schedule.epochs), at the end of which it is 0" in ok(fit(*schedule))


def test_more_epochs_without_checkpoints_have_a_remedy(fit: Run, folder: Path) -> None:
    ok(fit())
    shutil.rmtree(folder / "checkpoints")
    status, _, err = fit("--trainer.max_epochs", "3")
    assert status == 2
    assert f"start another run with --model.name_or_path {folder / 'model'}" in err
    assert (folder / "summary.json").is_file()


def test_a_moved_run_folder_goes_on_with_its_own_checkpoints(fit: Run, folder: Path, tmp_path: Path) -> None:
    """The checkpoints hold the path that the folder had."""
    metric = ["--monitor.metric", "loss"]
    ok(fit(*metric))
    before = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    shutil.move(folder, tmp_path / "moved")
    ok(fit(*metric, "--run_dir", str(tmp_path / "moved"), "--trainer.max_epochs", "3"))
    assert not folder.exists()
    assert before == 1
    assert summary_of(tmp_path / "moved")["epoch"] == 3
    assert [path.name for path in (tmp_path / "moved" / "checkpoints").glob("best*")] == ["best.ckpt"]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "summary.json"])
def test_a_damaged_run_folder_is_named(fit: Run, run: Run, folder: Path, name: str) -> None:
    ok(fit("--trainer.max_epochs", "1"))
    (folder / name).write_text("{")
    for found in (fit("--trainer.max_epochs", "1"), run("status", str(folder)), run("report", str(folder))):
        status, _, err = found
        assert status == 2
        assert f"{name} is damaged" in err


def test_a_checkpoint_that_was_cut_off_is_named(fit: Run, folder: Path) -> None:
    ok(fit("--trainer.max_epochs", "1"))
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    status, _, err = fit()
    assert status == 2
    assert f"{last} is damaged: expected a checkpoint. Delete it" in err
    last.unlink()
    (folder / "summary.json").unlink()
    assert "resuming from" not in ok(fit())  # nothing is left to go on from


# ---------------------------------------------------------------------- dry runs


@pytest.mark.parametrize(
    "limits",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.limit_train_batches", "1"],
        ["--trainer.limit_val_batches", "1"],
        ["--trainer.limit_val_batches", "0"],
        ["--trainer.limit_test_batches", "1"],
    ],
    ids=lambda limits: " ".join(limits),
)
def test_a_dry_run_leaves_nothing(fit: Run, folder: Path, limits: list[str]) -> None:
    out = ok(fit(*limits))
    name, value = limits[0].removeprefix("--"), limits[1].replace("true", "True")
    assert f"dry run ({name}={value}): no model, checkpoint or summary is written" in out
    assert ("val_f1" in out) is (limits[1] != "0")
    assert not folder.exists()


def test_a_dry_run_leaves_a_finished_run_as_it_is(fit: Run, folder: Path) -> None:
    ok(fit())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ok(fit("--trainer.fast_dev_run", "true", "--model.optimizer.lr", "1"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "is finished" in ok(fit())


# ---------------------------------------------------------------------- what is said of the result


def table(path: Path, labels: str) -> str:
    """Texts that say nothing of the labels."""
    path.write_text("text,label\n" + "".join(f"the same words,{label}\n" for label in labels))
    return str(path)


@pytest.mark.filterwarnings("ignore:.*same texts.*")
def test_a_model_that_learns_nothing_is_told_and_the_positive_label_too(
    fit: Run, run: Run, search: list[str], folder: Path, tmp_path: Path
) -> None:
    data = ["--data.train_file", table(tmp_path / "data.csv", "12" * 20), "--data.text_columns", "text"]
    data += ["--data.group_column", "null", "--trainer.max_epochs", "1"]
    out = ok(fit(*data))
    found = summary_of(folder)
    assert found["positive_label"] == "2"
    assert found["majority_baseline"] == pytest.approx(2 / 3, abs=1e-6)  # the F1 of a yes for every row
    constant, equal = found["warnings"]
    assert constant.startswith("no better than the same answer for every row: f1 ")
    assert equal.startswith("every row has the same score")
    assert f"WARNING: {constant}" in out
    report = (folder / "report.html").read_text()
    assert "Warning: no better than the same answer" in report
    assert "positive label" in report

    study = [*search, *data, "--run_dir", str(tmp_path / "search"), "--hpo.n_trials", "1", "--hpo.baseline", "false"]
    out = ok(run(*study))
    found = summary_of(tmp_path / "search")
    assert found["positive_label"] == "2"
    assert found["best_value"] <= found["majority_baseline"]
    assert "WARNING: no better than the same answer for every row" in out
    assert "positive label: 2" in out
    report = (tmp_path / "search" / "report.html").read_text()
    assert "Warning: no better than the same answer" in report
    assert "positive label" in report
