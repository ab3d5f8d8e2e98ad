"""Reads the study of a run, without changing or locking anything, while its workers go on."""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import BASELINE, SEED_REPLICATES
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.workers import FolderWorkers, Workers
from lightning_bge.runtime.run_folder import read_config

SPACE = "-space-"  # in the names of a study that has had several search spaces
SUMMARY = "summary"  # attribute of an ended study in a storage that machines share
READ_PATIENCE = 10.0  # seconds for which a reader waits for a storage
MOST_SPACES = 1000  # that are looked for
TAKEN_OVER = "taken_over"  # attribute of a study with a changed search space: all earlier trials are in it


class LoadedStudy(NamedTuple):
    """A study that is only read.

    Attributes:
        study: the study.
        seed_replicates: the trials of its seed replicates.
        living: the ids of the workers that live.
    """

    study: optuna.Study
    seed_replicates: list[FrozenTrial]
    living: set[str]


def load_study(run_dir: Path) -> LoadedStudy | None:
    """Load the study of a run folder.

    A line of the journal that is being written, or that was cut off when a process was killed, is left out.

    Args:
        run_dir: the run's folder, with `journal.log`, or with a `config.yaml` that names the storage.

    Returns:
        None where there is no study, or one that was created a moment ago and has no metric and space yet.

    Raises:
        StudyError: a line of the journal before the last is corrupt, `lightning-bge hpo` did not create the study, or
            its storage does not answer, or has it no more; or its journal is gone.
    """
    journal = run_dir / JOURNAL
    if journal.is_file():
        return _load(str(journal), JournalStorage(_ReadOnlyJournal(journal)), None, FolderWorkers(run_dir))
    shared = shared_storage_of(run_dir)
    if shared is None:
        if _study_options(run_dir):
            raise StudyError(f"{run_dir}: expected {JOURNAL}, as its config.yaml is that of a study. Copy it back")
        return None
    found = load_shared_study(*shared, run_dir)
    if found is None:  # it was there before `config.yaml` was
        raise StudyError(
            f"{run_dir}: expected the study {shared[1]} in {shared[0]}, which has none of that name. Set "
            "hpo.study_name in its config.yaml to the study's name"
        )
    return found


def shared_storage_of(run_dir: Path) -> tuple[str, str] | None:
    """The URL of a run's storage and the study's name in it, from its `config.yaml`; None: it names no storage."""
    hpo = _study_options(run_dir)
    return (hpo["storage"], hpo.get("study_name") or run_dir.resolve().name) if hpo.get("storage") else None


def _study_options(run_dir: Path) -> dict[str, Any]:
    """The options of the study in a run's `config.yaml`; empty: there is no such file, or it is that of a `fit`."""
    return (read_config(run_dir).get("hpo") or {}) if (run_dir / "config.yaml").is_file() else {}


def load_shared_study(url: str, name: str, run_dir: Path, option: str = "hpo.storage") -> LoadedStudy | None:
    """Load a study from a storage that machines share.

    Args:
        url: of the storage.
        name: of the study.
        run_dir: the run's folder, which need not exist.
        option: that named the URL, for messages.

    Returns:
        As `load_study`.

    Raises:
        ConfigError: the URL is wrong.
        StudyError: as `load_study`.
    """
    place = open_study_storage(run_dir, url, name, patience=READ_PATIENCE, option=option)
    return _load(place.name or name, place.storage, name, place.workers)


def _load(shown: str, storage: BaseStorage, base: str | None, workers: Workers) -> LoadedStudy | None:
    name = present_study(storage, base)
    if name is None:
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if not {"settings", "space", "steps"} <= set(study.user_attrs):
        return None
    if "monitor.metric" not in study.user_attrs["settings"]:
        raise StudyError(
            f"{shown}: expected a study that `lightning-bge hpo` created, but the study {study.study_name} does not "
            "name its metric. Name the run folder of a search"
        )
    replicates: list[FrozenTrial] = []
    if has_study(storage, f"{name}{SEED_REPLICATES}"):
        found = optuna.load_study(study_name=f"{name}{SEED_REPLICATES}", storage=storage)
        replicates = found.get_trials(deepcopy=False)
    return LoadedStudy(study, replicates, workers.seen_alive())


def study_names(storage: BaseStorage, base: str | None = None) -> list[str]:
    """The names of a study, one for each search space it has had, in their order.

    Args:
        storage: with the study in it.
        base: its first name, in a storage that holds other studies too; None: all of them are those of one run.
    """
    if base is None:
        names = [study.study_name for study in storage.get_all_studies()]
        return [name for name in names if not name.endswith((SEED_REPLICATES, BASELINE))]
    names = [base, *(f"{base}{SPACE}{number}" for number in range(2, 2 + MOST_SPACES))]
    return list(takewhile(lambda name: has_study(storage, name), names))


def has_study(storage: BaseStorage, name: str) -> bool:
    """Whether a storage has a study of that name."""
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def present_study(storage: BaseStorage, base: str | None = None) -> str | None:
    """The name of a run's study; None: there is none.

    Each change of the search space begins another study in the storage. The last one that has taken over the trials of
    the one before counts: a process may have been killed meanwhile.

    Args:
        storage: with the study in it.
        base: its first name, in a storage that holds other studies too; None: all of them are those of one run.
    """
    names = study_names(storage, base)
    while len(names) > 1 and not optuna.load_study(study_name=names[-1], storage=storage).user_attrs.get(TAKEN_OVER):
        names.pop()
    return names[-1] if names else None


class _ReadOnlyJournal(BaseJournalBackend):
    """A journal of which only complete lines are read, and to which nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    return  # cut off, or being written
                if number < log_number_from:
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    if not file.read(1):
                        return
                    raise StudyError(
                        f"{self.path}: line {number + 1} is not a record of the journal, and more lines follow it. "
                        "Restore the file from a copy, or delete that line if you accept losing its content."
                    ) from error
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError(f"{self.path} is only read here")
