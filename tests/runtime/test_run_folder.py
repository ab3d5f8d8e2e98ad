from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from lightning_bge.errors import StudyError
from lightning_bge.runtime.run_folder import (
    PACKAGES,
    absolute_folder,
    create_run_dir,
    describe_run,
    read_config,
    read_json,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_whole_and_over_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.txt"
    write_text(path, "old")
    write_text(path, "neu: ä\n")
    assert path.read_text(encoding="utf-8") == "neu: ä\n"
    assert names(tmp_path) == ["summary.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_failure_leaves_the_old_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "summary.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["summary.txt"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["summary.txt"]


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"value": 0.1, "names": ["a"]})
    assert read_json(tmp_path / "run.json") == {"schema_version": 1, "value": 0.1, "names": ["a"]}


def test_json_that_is_not_there_or_of_another_version(tmp_path: Path) -> None:
    assert read_json(tmp_path / "run.json") is None
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    assert read_json(tmp_path / "run.json") is None


def test_run_folder_is_its_owners_alone(tmp_path: Path) -> None:
    folder = create_run_dir(tmp_path / "runs" / "one")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert create_run_dir(str(folder)) == folder
    write_json(folder / "run.json", {})
    assert stat.S_IMODE((folder / "run.json").stat().st_mode) == 0o600


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert create_run_dir("~/runs") == tmp_path / "runs"


def test_record_says_how_to_repeat_the_run_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr("sys.argv", ["lightning-bge", "fit", "-c", "my.yaml"])
    monkeypatch.chdir(tmp_path)
    record = describe_run(seed=7, data_hash="abc", model=str(tmp_path), revision=None)
    assert record["command"] == ["lightning-bge", "fit", "-c", "my.yaml"]
    assert (record["seed"], record["data_hash"], record["folder"]) == (7, "abc", str(tmp_path))
    assert (record["model"], record["model_revision"], record["git_commit"]) == (str(tmp_path), None, None)
    assert record["versions"].keys() == set(PACKAGES)
    assert record["versions"]["torch"].startswith("2.")
    assert "verysecret" not in json.dumps(record)
    assert os.environ["PATH"] not in json.dumps(record)


def test_record_names_the_commit_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str | None:
        return describe_run(1, None, str(tmp_path), None)["git_commit"]

    git("init", "-q")
    assert commit() is None
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    Path("file").write_text("two")
    assert commit() == f"{head}-dirty"


def test_record_names_the_commit_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name"
    for branch, commit in (("main", "1" * 40), ("next", "2" * 40)):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)

    def revision(model: str, asked: str | None) -> str | None:
        return describe_run(1, None, model, asked)["model_revision"]

    assert revision("org/name", None) == "1" * 40
    assert revision("org/name", "next") == "2" * 40
    assert revision("org/name", "2" * 40) == "2" * 40
    assert revision("org/other", None) is None
    assert revision("org/other", "v1") == "v1"


def test_the_program_has_one_name_however_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/lightning_bge/cli/__main__.py", "fit"])
    assert describe_run(42, None, "model", None)["command"] == ["lightning-bge", "fit"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StudyError, match=f"{name} is damaged.*Restore it, or name another folder") as error:
        read_config(tmp_path) if name == "config.yaml" else read_json(path)
    assert "\n" not in str(error.value)


def test_a_folder_that_exists_has_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_folder("model") == absolute_folder(str(tmp_path / "model")) == str(tmp_path / "model")
    monkeypatch.chdir("/")
    assert absolute_folder("model", tmp_path) == str(tmp_path / "model")
    assert absolute_folder("owner/model") == "owner/model"
