"""Files in a folder or at a URL: both behave alike, URLs are checked, and a location that fails says so."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.errors import ConfigError, LocationError
from lightning_bge.runtime.locations import (
    Location,
    RemotePath,
    check_location,
    delete_folder,
    file_sizes,
    local_copy,
    local_folder,
    open_location,
)
from lightning_bge.runtime.run_folder import create_folder, read_json, write_atomically, write_json, write_text
from tests.helpers.memory_location import memory_location

SECRET = "planted-9c1e-secret"


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "place" if request.param == "folder" else memory_location()


def filled(place: Location) -> Location:
    for folder in (place, place / "a", place / "a" / "b"):
        create_folder(folder)
    write_text(place / "one", "1")
    write_text(place / "a" / "two", "22")
    write_text(place / "a" / "b" / "three", "333")
    return place


def test_what_is_written_is_read_listed_and_deleted(place: Location) -> None:
    assert file_sizes(place) == {}
    assert not (place / "one").is_file()
    filled(place)
    assert file_sizes(place) == {"one": 1, "a/two": 2, "a/b/three": 3}
    assert file_sizes(place / "a") == {"two": 2, "b/three": 3}
    assert (place / "a" / "two").is_file()
    assert not (place / "a").is_file()
    assert (place / "a" / "two").read_text(encoding="utf-8") == "22"
    write_text(place / "one", "eins, ä")
    assert (place / "one").read_text(encoding="utf-8") == "eins, ä"
    (place / "one").unlink()
    (place / "one").unlink(missing_ok=True)
    delete_folder(place / "a", first="two")
    assert file_sizes(place) == {}
    delete_folder(place / "a", first="two")


def test_json_is_read_as_it_was_written_and_none_where_there_is_no_file(place: Location) -> None:
    create_folder(place)
    assert read_json(place / "summary.json") is None
    write_json(place / "summary.json", {"a": [1, None]})
    assert read_json(place / "summary.json") == {"schema_version": 1, "a": [1, None]}


def test_copies_on_this_machine_have_the_content_and_are_gone_afterwards(place: Location) -> None:
    filled(place)
    with local_copy(place / "a" / "two") as copy, local_folder(place) as folder:
        assert copy.read_text() == "22"
        assert file_sizes(folder) == file_sizes(place)
        assert (folder / "a" / "b" / "three").read_text() == "333"
        assert copy.parent.stat().st_mode & 0o077 == 0 or copy == place / "a" / "two"
    assert copy.exists() == folder.exists() == isinstance(place, Path)
    assert (place / "a" / "two").is_file()


def test_a_write_that_fails_leaves_what_was_there(place: Location) -> None:
    filled(place)

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(place / "one", fail)
    assert (place / "one").read_text(encoding="utf-8") == "1"
    assert file_sizes(place) == {"one": 1, "a/two": 2, "a/b/three": 3}


def test_names_of_a_remote_path() -> None:
    path = open_location("files", "memory://bucket/run/") / "a" / "b"
    assert (str(path), path.name, str(path.parent)) == ("memory://bucket/run/a/b", "b", "memory://bucket/run/a")
    write_text(path, "x")
    assert path.parent.is_file() is False
    assert (path.parent / "b").is_file()


@pytest.mark.parametrize(
    ("call", "method", "verb"),
    [
        (lambda path: write_text(path, "x"), "put_file", "written"),
        (lambda path: path.is_file(), "info", "read"),
        (lambda path: path.read_text(), "cat_file", "read"),
        (lambda path: file_sizes(path), "find", "listed"),
        (lambda path: path.unlink(missing_ok=True), "rm_file", "deleted"),
        (lambda path: path.download(Path("x")), "get_file", "read"),
    ],
)
@pytest.mark.parametrize("error", [PermissionError("Access Denied"), RuntimeError("no route to host")], ids=repr)
def test_what_a_store_raises_is_one_error_with_the_url_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any], method: str, verb: str, error: Exception
) -> None:
    path = filled(memory_location()) / "one"
    assert isinstance(path, RemotePath)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(path.fs, method, fail)
    with pytest.raises(LocationError) as raised:
        call(path)
    assert str(raised.value).startswith(f"{path} can't be {verb} ({type(error).__name__}: {error})")


def test_a_missing_file_is_an_error_where_it_has_to_be_there() -> None:
    place = memory_location()
    for call in (lambda: (place / "x").read_text(), lambda: (place / "x").unlink(), lambda: next_copy(place / "x")):
        with pytest.raises(LocationError, match=r"x can't be (read|deleted) \(FileNotFoundError"):
            call()


def next_copy(path: Location) -> None:
    with local_copy(path):
        pass


def test_a_full_disk_of_this_machine_is_not_blamed_on_the_location(monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(memory_location()) / "one"
    assert isinstance(path, RemotePath)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(path.fs, "get_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        next_copy(path)
    assert raised.value.errno == errno.ENOSPC


# ---------------------------------------------------------------------- what the user may name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("local:///a/b", "/a/b"), ("./a:b", None), ("a/b:c", None)],
)
def test_paths_and_file_urls_are_folders(text: str, expected: str | None) -> None:
    assert open_location("files", text) == (Path(text).absolute() if expected is None else Path(expected))


@pytest.mark.parametrize(
    "text",
    [
        f"s3://key:{SECRET}@bucket/run",
        f"s3://key:ab/{SECRET}@bucket/run",
        f"https://{SECRET}@host/run",
        f"sftp://me:{SECRET}@host/run",
        f"abfs://container/run?sig={SECRET}",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^hpo\.files: .*without a password.*AWS_SECRET_ACCESS_KEY") as raised:
        check_location("hpo.files", text)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("text", ["sftp://me@host:2222/run", "abfs://container@account.dfs.core.windows.net/run"])
def test_a_url_with_a_name_and_no_password_is_accepted(text: str) -> None:
    check_location("hpo.files", text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a folder, or a URL like s3://bucket/folder, got ''"),
        ("~nobody-here/run", "there is no user 'nobody-here'"),
        ("s3:/bucket/run", "got 's3:/bucket/run'. A folder with a colon in its name needs ./ before it"),
        ("simplecache::s3://bucket/run", "expected one URL like s3://bucket/folder"),
        ("filecache://x::s3://bucket/run", "expected one URL like s3://bucket/folder"),
        ("s3://", "expected one URL like s3://bucket/folder, got 's3://'"),
        ("file://shared/run", "expected file:/// and an absolute path, got 'file://shared/run'"),
        ("nosuch://bucket/run", "Protocol not known: nosuch. Expected a protocol of fsspec, such as file, s3"),
        ("oss://bucket/run", "oss:// needs another package: Install ossfs"),
    ],
)
def test_what_is_no_location_is_refused_with_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_location("hpo.files", text)
    assert str(raised.value).startswith("hpo.files: ")
    assert says in str(raised.value)


def test_a_store_that_connects_at_once_and_can_not_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def fail(*_: Any) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(fsspec, "url_to_fs", fail)
    with pytest.raises(LocationError, match=r"sftp://host/run can't be reached \(ConnectionRefusedError"):
        open_location("hpo.files", "sftp://host/run/")
