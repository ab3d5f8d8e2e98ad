"""The location of a study's files, which all of its processes must see, and the check that they do."""

from __future__ import annotations

import uuid
from pathlib import Path

import optuna

from lightning_bge.errors import ConfigError, LocationError, StudyError
from lightning_bge.runtime.locations import Location, delete_folder, file_sizes, open_location
from lightning_bge.runtime.paths import check_folder
from lightning_bge.runtime.run_folder import create_folder, write_text

OPTION = "hpo.files"
FILES_ID = "files.id"  # file in the location: a random text by which processes know that they see the same files
FILES = "files"  # attribute of a study: that text as `id`, whether it is `written` there, and the `location`


def study_files(files: str | None, run_dir: Path) -> Location:
    """Where a study keeps what its processes share: the location that `hpo.files` names; None: the run folder.

    Raises:
        UserError: as `open_location`.
    """
    found = run_dir if files is None else open_location(OPTION, files)
    return run_dir if isinstance(found, Path) and found.resolve() == run_dir.resolve() else found


def check_files(files: str) -> None:
    """Write, read, list and delete a small file in a location.

    Raises:
        ConfigError: the location is no folder, or the package for this kind of URL is not installed.
        LocationError: it can't be reached, or does not allow one of these.
    """
    location = open_location(OPTION, files)
    if isinstance(location, Path):
        check_folder(OPTION, location)
    text = uuid.uuid4().hex
    folder = location / f"check-{text}"
    try:
        for one in (location, folder):
            create_folder(one)
    except OSError as error:  # such as in /proc, whose mode says that it can be written
        raise ConfigError(f"{OPTION}: {location} can't be written ({error.strerror}). Name another folder") from error
    write_text(folder / "file", text)
    if (folder / "file").read_text(encoding="utf-8") != text or list(file_sizes(folder)) != ["file"]:
        raise LocationError(f"{OPTION}: a file that was written to {location} was not found there. Name another one")
    delete_folder(folder, "file")


def join_files(study: optuna.Study, files: str | None, run_dir: Path) -> None:
    """Check that this process sees the files of the study's other processes. Call it under the lock of the study.

    The first process writes a random text into the location and into the study. So no process trains anew what was
    paused, or ends the study without the files, because it looks elsewhere.

    Args:
        study: the study, as it was created or loaded.
        files: `hpo.files`.
        run_dir: the run's folder.

    Raises:
        StudyError: the location has no such text, or that of another study.
        LocationError: the location can't be read or written.
    """
    location = study_files(files, run_dir)
    known, found = study.user_attrs.get(FILES), _read_id(location)
    if known is None:
        if found is not None and not study.get_trials(deepcopy=False):
            raise StudyError(
                f"{location} holds the files of another study than {study.study_name}, which is new. Set "
                f"hpo.study_name to the name of that study, or name another run_dir or {OPTION}"
            )
        # a study that was begun without this text takes the location of the first process that comes
        known = {"id": found or uuid.uuid4().hex, "written": False}
        study.set_user_attr(FILES, known)  # first: a text in the location is then that of some study
    if found is None and not known["written"]:
        create_folder(location)
        write_text(location / FILES_ID, known["id"])
        found = _read_id(location)
    if found != known["id"]:
        raise StudyError(
            f"this process does not see the files of the study's other processes: expected {known['id']} in "
            f"{location / FILES_ID}, found {found or 'no such file'}. They have {OPTION} "
            f"{known.get('location') or 'null'}. Share the run folder, or set {OPTION} to a location that all of them "
            f"reach; to move the files of a study, copy them with {FILES_ID}; where they are gone, begin another "
            "study, with hpo.study_name or run_dir"
        )
    joined = {"id": found, "written": True, "location": None if files is None else str(location)}
    if joined != known:
        study.set_user_attr(FILES, joined)


def _read_id(location: Location) -> str | None:
    path = location / FILES_ID
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
