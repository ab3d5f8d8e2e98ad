"""The logits of all validations of all trials: what a study's selection is repeated on, on resamples of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import optuna
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bge.hpo.ranking import score_of, sign_of
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trials import latest_trials
from lightning_bge.runtime.locations import Location, file_sizes, local_copy
from lightning_bge.runtime.run_folder import create_folder, write_atomically

SUFFIX = ".safetensors"
AnyPath = TypeVar("AnyPath", Path, Location)


class KeptPredictions:
    """The logits of a parameter set's validations, by their steps.

    Args:
        folder: where they are kept, a file for each parameter set.
        number: of the parameter set.
        until: what was kept up to this step is taken over; later steps are trained once more.

    Attributes:
        logits: step -> float32 [rows of the fold, outputs].
    """

    def __init__(self, folder: Location, number: int, until: int = 0) -> None:
        self.folder, self.path = folder, kept_file(folder, number)
        self.logits: dict[int, Tensor] = {}
        if until and self.path.is_file():
            with local_copy(self.path) as copy:
                self.logits = {step: found for step, found in load_logits(copy).items() if step <= until}
        self._written = len(self.logits)

    def add(self, curve: Sequence[Report], logits: Sequence[Tensor]) -> None:
        """Add the validations of a fold, each with its report; write the file where there are new ones."""
        self.logits |= {report.step: found for report, found in zip(curve, logits, strict=False)}
        if len(self.logits) == self._written:
            return
        create_folder(self.folder)
        content = {str(step): found.contiguous() for step, found in self.logits.items()}
        write_atomically(self.path, lambda draft: save_file(content, draft))
        self._written = len(self.logits)


def kept_file(folder: AnyPath, number: int) -> AnyPath:
    """The file of a parameter set."""
    return folder / f"{number}{SUFFIX}"


def numbered_files(folder: Location) -> dict[int, int]:
    """The bytes of the files `N.safetensors` in a folder, by their numbers."""
    stems = {name.removesuffix(SUFFIX): size for name, size in file_sizes(folder).items() if name.endswith(SUFFIX)}
    return {int(stem): size for stem, size in stems.items() if stem.isdecimal()}


def load_logits(path: Path) -> dict[int, Tensor]:
    """What is kept of a parameter set, by steps, ascending."""
    return dict(sorted((int(step), found) for step, found in load_file(path).items()))


def kept_steps(path: Path) -> set[int]:
    """The steps of which something is kept."""
    with safe_open(path, framework="pt") as file:
        return {int(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping


def limit_predictions(folder: Location, study: optuna.Study, limit: int) -> None:
    """Delete what is kept of the parameter sets that matter least, until the rest takes at most so many bytes.

    Those that were trained least go first, and of them the worst.

    Args:
        folder: with a file for each parameter set.
        study: whose parameter sets they are.
        limit: bytes.
    """
    sizes = numbered_files(folder)
    total, sign = sum(sizes.values()), sign_of(study)
    if total <= limit:
        return
    rank: dict[int, tuple[float, float]] = {}
    for number, trial in latest_trials(study.get_trials(deepcopy=False)).items():
        values, score = trial.intermediate_values, score_of(trial)
        if score is not None:
            rank[number] = (math.inf, sign * score)
        elif values:
            rank[number] = (len(values), sign * values[max(values)])
    for number in sorted(sizes, key=lambda one: rank.get(one, (0, 0.0))):
        if total <= limit:
            return
        kept_file(folder, number).unlink(missing_ok=True)
        total -= sizes[number]
