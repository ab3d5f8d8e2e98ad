"""Reads the study of a run folder from its journal, without writing or locking, while workers may append to it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import BASELINE, JOURNAL, SEED_REPLICATES

TAKEN_OVER = "taken_over"  # attribute of a study with a changed search space: all earlier trials are in it


def load_study(run_dir: Path) -> tuple[optuna.Study, list[FrozenTrial]] | None:
    """Load the study of a run folder and the trials of its seed replicates.

    A line that is being written, or that was cut off when a process was killed, is left out.

    Args:
        run_dir: the run's folder, with `journal.log`.

    Returns:
        None where there is no study, or one that was created a moment ago and has no metric and space yet.

    Raises:
        StudyError: a line of the journal before the last is corrupt, or `lightning-bge hpo` did not create the study.
    """
    journal = run_dir / JOURNAL
    if not journal.is_file():
        return None
    storage = JournalStorage(_ReadOnlyJournal(journal))
    name = present_study(storage)
    if name is None:
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if not {"settings", "space", "steps"} <= set(study.user_attrs):
        return None
    if "monitor.metric" not in study.user_attrs["settings"]:
        raise StudyError(
            f"{journal}: expected a study that `lightning-bge hpo` created, but the study {study.study_name} does not "
            "name its metric. Name the run folder of a search"
        )
    if f"{name}{SEED_REPLICATES}" not in [study.study_name for study in storage.get_all_studies()]:
        return study, []
    replicates = optuna.load_study(study_name=f"{name}{SEED_REPLICATES}", storage=storage)
    return study, replicates.get_trials(deepcopy=False)


def study_names(storage: BaseStorage) -> list[str]:
    """The names of the studies in a journal, in their order, without those of seed replicates and baselines."""
    names = [study.study_name for study in storage.get_all_studies()]
    return [name for name in names if not name.endswith((SEED_REPLICATES, BASELINE))]


def present_study(storage: BaseStorage) -> str | None:
    """The name of a run folder's study; None: there is none.

    Each change of the search space begins another study in the journal. The last one that has taken over the trials of
    the one before counts: a process may have been killed meanwhile.
    """
    names = study_names(storage)
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
