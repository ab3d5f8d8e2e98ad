"""Reads the study of a run folder from its journal, without writing or locking, while workers may append to it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import JOURNAL, SEED_REPLICATES


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
    names = [study.study_name for study in storage.get_all_studies()]
    # each change of the search space begins another study
    name = next((name for name in reversed(names) if not name.endswith(SEED_REPLICATES)), None)
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
    if f"{name}{SEED_REPLICATES}" not in names:
        return study, []
    replicates = optuna.load_study(study_name=f"{name}{SEED_REPLICATES}", storage=storage)
    return study, replicates.get_trials(deepcopy=False)


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
