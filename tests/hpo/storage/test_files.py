"""The location of a study's files: all of its processes must see the same one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_bge.errors import ConfigError, LocationError, StudyError
from lightning_bge.hpo.storage.files import FILES, FILES_ID, check_files, join_files, study_files
from lightning_bge.runtime.locations import RemotePath, file_sizes
from lightning_bge.runtime.run_folder import write_text
from tests.helpers.fake_study import fake_config, open_fake
from tests.helpers.memory_location import memory_location


def new_study(n_trials: int = 0) -> optuna.Study:
    study = optuna.create_study(study_name="s")
    for _ in range(n_trials):
        study.tell(study.ask(), 0.5)
    return study


def text_of(folder: Path) -> str:
    return (folder / FILES_ID).read_text()


def test_files_are_in_the_run_folder_or_where_the_option_says(tmp_path: Path) -> None:
    assert study_files(None, tmp_path) == tmp_path
    assert study_files(f"file://{tmp_path}/", tmp_path) is tmp_path
    assert study_files(str(tmp_path / "other"), tmp_path) == tmp_path / "other"
    assert isinstance(study_files("memory://bucket/run", tmp_path), RemotePath)


def test_all_processes_that_see_the_same_files_may_join(tmp_path: Path) -> None:
    place = memory_location()
    for files, run_dirs in ((None, ["a", "a"]), (str(place), ["b", "c"]), (str(tmp_path / "shared"), ["d", "e"])):
        study = new_study()
        for run_dir in run_dirs:
            join_files(study, files, tmp_path / run_dir)
        known = study.user_attrs[FILES]
        assert known == {"id": known["id"], "written": True, "location": files}
    assert text_of(tmp_path / "a") != text_of(tmp_path / "shared")
    assert not any((tmp_path / name / FILES_ID).exists() for name in "bcde")


@pytest.mark.parametrize("n_trials", [0, 3])
def test_a_process_that_sees_other_files_is_refused(tmp_path: Path, n_trials: int) -> None:
    study = new_study()
    join_files(study, None, tmp_path / "a")
    for _ in range(n_trials):
        study.tell(study.ask(), 0.5)
    says = rf"does not see the files.*expected {text_of(tmp_path / 'a')} in .*b/files.id, found no such file.*hpo.files"
    with pytest.raises(StudyError, match=says):
        join_files(study, None, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    join_files(new_study(), None, tmp_path / "c")
    with pytest.raises(StudyError, match=f"found {text_of(tmp_path / 'c')}"):
        join_files(study, None, tmp_path / "c")
    with pytest.raises(StudyError, match=r"bucket://.*found no such file\. They have hpo\.files null\."):
        join_files(study, str(memory_location()), tmp_path / "a")
    join_files(study, None, tmp_path / "a")


def test_a_new_study_does_not_take_the_files_of_another_one(tmp_path: Path) -> None:
    place = memory_location()
    join_files(new_study(), str(place), tmp_path)
    study = new_study()
    with pytest.raises(StudyError, match=r"another study than s, which is new\. Set hpo\.study_name to the"):
        join_files(study, str(place), tmp_path)
    assert FILES not in study.user_attrs


def test_a_study_from_before_goes_on_and_so_does_a_run_folder_that_was_copied(tmp_path: Path) -> None:
    study = new_study(n_trials=2)
    join_files(study, None, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    join_files(study, None, tmp_path / "b")
    other = new_study(n_trials=1)  # as in a copy of its storage
    join_files(other, None, tmp_path / "b")
    assert other.user_attrs[FILES] == study.user_attrs[FILES]


@pytest.mark.parametrize("at", ["attribute", "file"])
def test_a_process_that_dies_while_it_writes_the_text_leaves_a_study_that_can_be_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    study, place = new_study(), memory_location()
    if at == "file":  # before it is written
        monkeypatch.setattr(place.fs, "put_file", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(LocationError):
            join_files(study, str(place), tmp_path)
        monkeypatch.undo()
    else:  # after it is written
        study.set_user_attr(FILES, {"id": "x", "written": False})
        write_text(place / FILES_ID, "x")
    join_files(study, str(place), tmp_path)
    assert study.user_attrs[FILES]["written"]
    with pytest.raises(StudyError, match="found no such file"):
        join_files(study, None, tmp_path)


def test_a_changed_search_space_goes_on_with_the_same_files(tmp_path: Path) -> None:
    study = open_fake(tmp_path, fake_config())
    join_files(study, None, tmp_path)
    space = {"x": {"low": 0.0, "high": 0.5}}
    changed = open_fake(tmp_path, fake_config(space=space))
    assert changed.study_name != study.study_name
    assert changed.user_attrs[FILES] == study.user_attrs[FILES]
    join_files(changed, None, tmp_path)


def test_what_is_written_for_the_check_is_deleted_again(tmp_path: Path) -> None:
    place = memory_location()
    write_text(place / "mine", "x")
    check_files(str(place))
    assert file_sizes(place) == {"mine": 1}
    check_files(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("method", "says"), [("put_file", "written"), ("cat_file", "read"), ("find", "listed"), ("rm_file", "deleted")]
)
def test_a_location_that_does_not_allow_what_is_needed_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, says: str
) -> None:
    place = memory_location()

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(place.fs, method, fail)
    with pytest.raises(LocationError, match=rf"can't be {says} \(PermissionError: Access Denied\)"):
        check_files(str(place))


def test_a_store_that_does_not_show_what_was_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory_location()
    monkeypatch.setattr(place.fs, "find", lambda *_, **__: {})
    with pytest.raises(LocationError, match=r"written to bucket://.* was not found there"):
        check_files(str(place))


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"hpo.files: .*file is a file, where a folder is needed"):
        check_files(str(tmp_path / "file"))
