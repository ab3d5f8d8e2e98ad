"""Warm trials: the same values as cold ones, from one load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import strategy as lightning_strategy

from lightning_bge.hpo.trackers.tracking import Tracking
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.metrics.config import MonitorConfig
from tests.helpers.memory_tracker import STUDY, MemoryTracker
from tests.helpers.small_search import make, write_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


class Cold:
    load = staticmethod(load_classifier)
    loads = nbytes = 0


def search(objective: Objective, trials: int = 4) -> optuna.Study:
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1), study_name="s")
    study.optimize(objective, n_trials=trials)
    return study


def test_warm_trials_equal_cold_ones_bit_for_bit(folder: Path) -> None:
    warm = make(folder)
    found = search(warm)
    assert warm.encoder.loads == 1
    expected = search(make(folder, encoder=Cold()))
    for one, other in zip(found.trials, expected.trials, strict=True):
        assert one.params == other.params
        assert one.intermediate_values == other.intermediate_values
        assert one.values == other.values
    assert len({trial.params["dropout"] for trial in found.trials}) > 1


@pytest.mark.parametrize("pruned", [False, True])
def test_nothing_is_moved_to_the_host_when_a_fold_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    moved: list[object] = []
    seen: list[int] = []

    def to_device(optimizers: Any, device: object) -> None:
        moved.extend(value for optimizer in optimizers for value in optimizer.state.values())

    def cpu(module: LightningModule) -> LightningModule:
        moved.extend(module.net.parameters() if module.net is not None else ())  # type: ignore[union-attr]
        seen.append(1)
        return module

    monkeypatch.setattr(lightning_strategy, "_optimizers_to_device", to_device)
    monkeypatch.setattr(LightningModule, "cpu", cpu)
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=-1.0) if pruned else None)
    study.optimize(make(folder), n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["PRUNED" if pruned else "COMPLETE"]
    assert len(seen) == (1 if pruned else 2)
    assert not moved


def test_reporting_more_often_changes_no_result(folder: Path) -> None:
    once, often = search(make(folder)), search(make(folder, per_epoch=3))
    for one, other in zip(once.trials, often.trials, strict=True):
        assert one.params == other.params
        assert one.value == other.value
        assert one.user_attrs["fold_scores"] == other.user_attrs["fold_scores"]
        assert list(other.intermediate_values) == list(range(1, 13))
        # the reports at the ends of epochs are the same ones
        assert [other.intermediate_values[3 * step] for step in one.intermediate_values] == pytest.approx(
            list(one.intermediate_values.values())
        )


def test_each_trial_keeps_the_seconds_of_its_reports(folder: Path) -> None:
    [trial] = search(make(folder, per_epoch=2), trials=1).trials
    steps = [report[0] for fold in trial.user_attrs["curve"] for report in fold]
    assert steps == list(range(1, 9))
    assert all(min(report[2:]) >= 0 for fold in trial.user_attrs["curve"] for report in fold)


def test_trackers_have_all_reports_with_the_losses_while_the_trial_runs(folder: Path) -> None:
    tracker = MemoryTracker()
    monitor = MonitorConfig(metric="accuracy")
    study = search(make(folder, monitor=monitor, tracking=Tracking([tracker], STUDY)), trials=2)
    assert len(tracker.runs) == 2
    for run, trial in zip(tracker.runs.values(), study.trials, strict=True):
        assert run.state is None  # the one who calls the objective ends it
        assert run.logger.points.pop("f1") == trial.intermediate_values
        curve = trial.user_attrs["curve"]
        assert run.logger.points == {
            f"fold_{k}/{name}": {report[0]: report[place] for report in fold}
            for k, fold in enumerate(curve)
            for name, place in (("f1", 1), ("loss", 6))
        }
        assert len({report[6] for fold in curve for report in fold}) == 4
