"""The logits of all validations, kept within a limit."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trial.kept_predictions import (
    KeptPredictions,
    kept_file,
    kept_steps,
    limit_predictions,
    load_logits,
)
from lightning_bge.runtime.locations import Location, file_sizes
from lightning_bge.runtime.run_folder import write_text
from tests.helpers.memory_location import memory_location


def report(step: int) -> Report:
    return Report(step, 0.5, 1.0, 1.0, 1.0, 1.0)


def logits(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count, 1), value)


def test_what_was_kept_comes_back_by_steps_in_their_order(tmp_path: Path) -> None:
    kept = KeptPredictions(tmp_path / "p", 3)
    kept.add([report(1), report(2)], [logits(4, 1.0), logits(4, 2.0)])
    kept.add([report(10)], [logits(5, 3.0)])
    found = load_logits(kept_file(tmp_path / "p", 3))
    assert list(found) == [1, 2, 10]
    assert [float(one[0]) for one in found.values()] == [1.0, 2.0, 3.0]
    assert kept_steps(kept_file(tmp_path / "p", 3)) == {1, 2, 10}
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700


def test_steps_after_the_checkpoint_are_trained_and_kept_once_more(tmp_path: Path) -> None:
    KeptPredictions(tmp_path, 0).add([report(1), report(2), report(3)], [logits(2, 1.0) for _ in range(3)])
    continued = KeptPredictions(tmp_path, 0, until=2)
    assert list(continued.logits) == [1, 2]
    continued.add([report(1), report(2), report(3)], [logits(2, 1.0), logits(2, 1.0), logits(2, 9.0)])
    assert float(load_logits(kept_file(tmp_path, 0))[3][0]) == 9.0


def test_a_parameter_set_that_starts_anew_takes_nothing_over(tmp_path: Path) -> None:
    KeptPredictions(tmp_path, 0).add([report(1)], [logits(2)])
    assert KeptPredictions(tmp_path, 0).logits == {}


def test_validations_whose_report_is_missing_are_not_kept(tmp_path: Path) -> None:
    kept = KeptPredictions(tmp_path, 0)
    kept.add([report(4)], [logits(2, 4.0), logits(2, 5.0)])
    assert {step: float(one[0]) for step, one in kept.logits.items()} == {4: 4.0}


def test_a_file_that_was_deleted_is_no_error(tmp_path: Path) -> None:
    assert KeptPredictions(tmp_path, 0, until=4).logits == {}


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_beyond_the_limit_the_least_trained_and_of_them_the_worst_go_first(
    tmp_path: Path, direction: str, where: str
) -> None:
    folder: Location = tmp_path if where == "folder" else memory_location()
    study = optuna.create_study(direction=direction)
    for number, values in enumerate([{1: 0.5}, {1: 0.9}, {1: 0.7}, {1: 0.1, 2: 0.1}]):
        study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values=values))
        KeptPredictions(folder, number).add([report(1)], [logits(100)])
    write_text(folder / "4", "no predictions")
    size = file_sizes(folder)["0.safetensors"]

    def left() -> set[int]:
        return {int(name.removesuffix(".safetensors")) for name in file_sizes(folder) if name != "4"}

    limit_predictions(folder, study, 4 * size)
    assert left() == {0, 1, 2, 3}
    limit_predictions(folder, study, 3 * size)
    assert left() == ({1, 2, 3} if direction == "maximize" else {0, 2, 3})
    limit_predictions(folder, study, 2 * size - 1)
    assert left() == {3}
    limit_predictions(folder, study, 0)
    assert left() == set()
    assert (folder / "4").is_file()
