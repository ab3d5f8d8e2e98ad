"""What a study is resumed with: the same content of files, tokenizer and labels, wherever they lie."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_bge.cli import main as cli
from lightning_bge.data import encoded_file
from lightning_bge.hpo import identity, versions
from lightning_bge.hpo.analysis.journal import load_study
from tests.helpers.small_models import piece_tokenizer, word_tokenizer
from tests.helpers.small_search import write_files

Run = Callable[..., tuple[int, str, str]]
COMMAND = (
    *("hpo", "--run_dir", "study", "--model.name_or_path", "model", "--data.train_file", "train.csv"),
    *("--data.cache_dir", "cache", "--data.max_length", "32", "--data.group_column", "group"),
    *("--trainer.precision", "32-true", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
    *("--hpo.n_trials", "1", "--hpo.pruner.name", "none"),
)
LR = '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": true}}'
VAL, TEST, SPACE = ("--data.val_file", "val.csv"), ("--data.test_file", "test.csv"), ("--hpo.space", LR)
REFUSED = "holds trials that can't be compared with the requested ones. Differences:"


def change(file: str, row: int, old: str, new: str) -> None:
    """Replace a part of a row (from 1) of a file."""
    lines = Path(file).read_text().splitlines(keepends=True)
    assert old in lines[row]
    lines[row] = lines[row].replace(old, new, 1)
    Path(file).write_text("".join(lines))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of one trial, which has a validation file and a test file."""
    folder = write_files(tmp_path_factory.mktemp("identity"))
    head, *rows = (folder / "train.csv").read_text().splitlines()
    rows = [f"{row},g{number // 2}" for number, row in enumerate(rows)]
    for name, part in {"train": rows[:24], "val": rows[24:32], "test": rows[32:]}.items():
        (folder / f"{name}.csv").write_text("\n".join([f"{head},group", *part]) + "\n")
    handlers = logging.getLogger().handlers[:]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-bge", *COMMAND, *VAL, *TEST, *SPACE])
        cli.main()
    logging.getLogger().handlers[:] = handlers
    return folder


@pytest.fixture
def folder(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(started, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def keep_case() -> None:
    word_tokenizer(do_lower_case=False).save_pretrained("model")


def settings() -> dict[str, Any]:
    found = load_study(Path("study"))
    assert found is not None
    return found[0].user_attrs["settings"]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda: change("train.csv", 3, ",0,", ",1,"), ["data.train_file (content)"]),
        (lambda: change("train.csv", 3, ",g", ",h"), ["data.train_file (content)"]),
        (lambda: change("val.csv", 1, ",0,", ",1,"), ["data.val_file (content)"]),
        (lambda: change("val.csv", 1, "w", "ww"), ["data.val_file (content)"]),
        (lambda: change("test.csv", 1, ",0,", ",1,"), ["data.test_file (content)"]),
        (lambda: change("test.csv", 1, ",g", ",h"), ["data.test_file (content)"]),
        (keep_case, ["tokenizer of model (content)"]),
    ],
    ids=["training label", "group", "validation label", "validation text", "test label", "test group", "tokenizer"],
)
def test_changed_content_is_refused_by_name(run: Run, folder: Path, how: Callable[[], None], named: list[str]) -> None:
    how()
    status, _, err = run(*COMMAND, *VAL, *TEST, *SPACE, "--hpo.n_trials", "2")
    assert status == 2
    assert REFUSED in err
    lines = [line.strip() for line in err.splitlines() if " in the folder, " in line]
    assert [line.split(": ")[0] for line in lines] == named
    assert "sha256 " in lines[0]
    assert len(load_study(Path("study"))[0].trials) == 1  # type: ignore[index]


def test_another_order_of_the_labels_is_refused(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = encoded_file.fit_labels
    monkeypatch.setattr(encoded_file, "fit_labels", lambda *args: ordered(*args)[::-1])  # as another version may sort
    encoded_file.load_training_file.cache_clear()
    status, _, err = run(*COMMAND, *VAL, *TEST, *SPACE)
    encoded_file.load_training_file.cache_clear()
    assert status == 2
    assert "labels (content): ['0', '1'] in the folder, ['1', '0'] requested" in err


def test_a_validation_file_that_is_left_out_is_named(run: Run, folder: Path) -> None:
    status, _, err = run(*COMMAND, *TEST, *SPACE)
    assert status == 2
    assert "data.val_file (content): sha256 " in err
    assert "data.split (content): sha256 " in err


def test_files_of_the_same_content_may_lie_elsewhere(run: Run, folder: Path) -> None:
    command = [*COMMAND, *VAL, *TEST, *SPACE]
    for name in ("train", "val", "test"):
        Path(f"{name}.csv").rename(f"moved_{name}.csv")
        command[command.index(f"{name}.csv")] = f"moved_{name}.csv"
    AutoTokenizer.from_pretrained("model").save_pretrained("model")  # other files, the same tokenizer
    status, out, err = run(*command, "--hpo.n_trials", "2")
    assert status == 0, err
    assert "2 trials complete" in out


def test_a_test_file_may_be_added_and_is_remembered_from_then_on(run: Run, folder: Path) -> None:
    shutil.rmtree("study")
    status, _, err = run(*COMMAND, *VAL, *SPACE, "--hpo.refit", "false")
    assert status == 0, err
    assert "data.test_file (content)" not in settings()
    status, out, err = run(*COMMAND, *VAL, *TEST, *SPACE)
    assert status == 0, err
    assert "test file, scored once" in out
    assert settings()["data.test_file (content)"].startswith("sha256 ")
    assert run(*COMMAND, *VAL, *SPACE, "--hpo.refit", "false")[0] == 0  # left out once more, and not forgotten
    change("test.csv", 2, ",1,", ",0,")
    status, _, err = run(*COMMAND, *VAL, *TEST, *SPACE)
    assert status == 2
    assert "data.test_file (content): sha256 " in err


def test_a_test_file_with_an_unknown_label_is_refused_before_the_first_trial(run: Run, folder: Path) -> None:
    shutil.rmtree("study")
    change("test.csv", 1, ",0,", ",maybe,")
    status, _, err = run(*COMMAND, *VAL, *TEST, *SPACE)
    assert status == 2
    assert "test.csv: label 'maybe'" in err
    assert not Path("study", "journal.log").exists()


def test_the_tokenizer_of_each_searched_model_counts(run: Run, folder: Path) -> None:
    shutil.copytree("model", "other")
    space = ("--hpo.space", '{"model.name_or_path": {"choices": ["model", "other"]}}')
    shutil.rmtree("study")
    status, _, err = run(*COMMAND, *VAL, *space, "--hpo.refit", "false")
    assert status == 0, err
    assert {"tokenizer of model (content)", "tokenizer of other (content)"} <= settings().keys()
    shutil.copytree("model", "third")  # one more model: the two that were known are compared
    more = ("--hpo.space", '{"model.name_or_path": {"choices": ["model", "other", "third"]}}', "--hpo.refit", "false")
    status, _, err = run(*COMMAND, *VAL, *more)
    assert status == 0, err
    piece_tokenizer().save_pretrained("other")
    status, _, err = run(*COMMAND, *VAL, *more)
    assert status == 2
    assert "tokenizer of other (content): sha256 " in err


def test_a_searched_option_that_changes_the_training_rows_has_its_content_too(run: Run, folder: Path) -> None:
    shutil.rmtree("study")
    shutil.copy("train.csv", "more.csv")
    change("more.csv", 3, ",0,", ",1,")
    space = ("--hpo.space", '{"data.train_file": {"choices": ["train.csv", "more.csv"]}}', "--hpo.refit", "false")
    status, _, err = run(*COMMAND, *VAL, *space)
    assert status == 0, err
    change("more.csv", 5, ",0,", ",1,")
    status, _, err = run(*COMMAND, *VAL, *space)
    assert status == 2
    assert "data.train_file with data.train_file=more.csv (content): sha256 " in err


def test_a_process_for_which_the_searched_precision_auto_is_another_one_is_refused(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("study")
    space = ("--hpo.space", '{"trainer.precision": {"choices": ["auto", "32-true"]}}', "--hpo.refit", "false")
    monkeypatch.setattr(identity, "choose_precision", lambda accelerator: ("32-true", ""))
    status, _, err = run(*COMMAND, *VAL, *space)
    assert status == 0, err
    monkeypatch.setattr(identity, "choose_precision", lambda accelerator: ("bf16-mixed", ""))
    status, _, err = run(*COMMAND, *VAL, *space)
    assert status == 2
    assert "trainer.precision=auto (content): 32-true in the folder, bf16-mixed requested" in err


def test_other_versions_are_noticed_and_not_refused(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = versions.used_versions("cpu")
    summary = json.loads(Path("study/summary.json").read_text())
    assert summary["computed_with"] == {"first": first, "others": []}
    monkeypatch.setattr(versions, "version", {**first, "torch": "99.0"}.__getitem__)
    status, out, err = run(*COMMAND, *VAL, *TEST, *SPACE, "--hpo.n_trials", "3")
    assert status == 0, err
    said = f"the first process of this study computed with torch {first['torch']}, this one with torch 99.0"
    assert err.count(said) == 1
    assert f"2 of the trials: computed with torch 99.0 instead of torch {first['torch']}" in out
    found = load_study(Path("study"))
    assert found is not None
    assert [trial.user_attrs.get("computed_with") for trial in found[0].trials] == [None, *[{"torch": "99.0"}] * 2]
    summary = json.loads(Path("study/summary.json").read_text())
    assert summary["computed_with"]["others"] == [{"n_trials": 2, "versions": {"torch": "99.0"}}]
    assert "{'torch': '99.0'}" in Path("study/trials.csv").read_text()
    wider = ("--hpo.space", LR.replace("1.0e-2", "2.0e-2"))  # another study, which takes over the trials
    status, out, err = run(*COMMAND, *VAL, *TEST, *wider, "--hpo.n_trials", "3")
    assert status == 0, err
    assert f"2 of the trials: computed with torch 99.0 instead of torch {first['torch']}" in out
