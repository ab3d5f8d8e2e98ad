"""Trials that pause at rungs: a resumed trial equals one that never paused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from lightning.pytorch import Callback
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from lightning_bge.hpo.pruning.asha import AshaPruner, nothing_left
from lightning_bge.hpo.pruning.asha_scheduler import AshaScheduler
from lightning_bge.hpo.pruning.asha_trials import (
    PAUSED_AT,
    RESUMES,
    ended_parameter_sets,
    parameter_set_of,
    resume,
)
from lightning_bge.hpo.trial.out_of_fold import predictions_file
from lightning_bge.models.metrics import MonitorConfig
from tests.helpers.plain_halving import plain_halving
from tests.helpers.small_search import make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)
PARAMS = {"lr": 3e-3, "dropout": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


class PauseAt(AshaPruner):
    """Pauses the first trial of a parameter set at one step."""

    def __init__(self, step: int | None) -> None:
        super().__init__([] if step is None else [step], 4)
        self.step = step

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.last_step == self.step and RESUMES not in trial.user_attrs


class Weights(Callback):
    """Keeps the weights at the end of each fit."""

    def __init__(self) -> None:
        self.ends: list[dict[str, torch.Tensor]] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})


def run(
    folder: Path, step: int | None, params: dict[str, float] = PARAMS, **changes: Any
) -> tuple[FrozenTrial, Weights, optuna.Study]:
    """One trial with a pause at a step, resumed to its end."""
    weights = Weights()
    settings = {"oof_dir": folder / "oof", "paused_dir": folder / "paused", "per_epoch": 2, "n_trials": 16, **changes}
    objective = make(folder, (weights,), **settings)
    study = optuna.create_study(direction="minimize", pruner=PauseAt(step), study_name="s")
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    if step is not None:
        assert study.trials[0].state == TrialState.PRUNED
        assert study.trials[0].user_attrs[PAUSED_AT] == study.trials[0].last_step == step
        assert (folder / "paused" / "0" / "state.pt").is_file()
        resume(study, study.trials[0], [step])
        study.optimize(objective, n_trials=1)
        shutil.rmtree(folder / "paused")
    return study.trials[-1], weights, study


@pytest.mark.parametrize("objective", ["best", "last"])
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(folder: Path, objective: Any) -> None:
    monitor = MonitorConfig("loss", objective)
    whole, weights, _ = run(folder, None, monitor=monitor)
    expected = load_file(predictions_file(folder / "oof", whole.number))
    assert whole.state == TrialState.COMPLETE
    for step in range(1, 8):
        resumed, again, _ = run(folder, step, monitor=monitor)
        assert resumed.state == TrialState.COMPLETE
        assert resumed.value == whole.value, step
        assert resumed.intermediate_values == whole.intermediate_values, step
        for name in ("fold_scores", "fold_epochs"):
            assert resumed.user_attrs[name] == whole.user_attrs[name]
        found = load_file(predictions_file(folder / "oof", resumed.number))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        # a fold that pauses at its last report is not trained again
        for one, other in zip(weights.ends[::-1], again.ends[::-1], strict=False):
            assert all(torch.equal(one[name], other[name]) for name in one), step
        steps = [report[0] for fold in resumed.user_attrs["curve"] for report in fold]
        assert steps == list(range(1, 9))


def test_a_resumed_trial_stops_early_where_the_uninterrupted_one_does(folder: Path) -> None:
    options: dict[str, Any] = {"monitor": MonitorConfig("loss", "best", patience=1), "epochs": 5}
    options["params"] = {"lr": 1e-2, "dropout": 0.0}
    whole, _, _ = run(folder, None, **options)
    trained = [len(fold) for fold in whole.user_attrs["curve"]]
    assert trained[0] == 4  # reports of the first fold's two epochs, of ten in all
    for step in (1, 2, 3, 4, 10, 12):  # 10: the first fold's reports that early stopping left out
        resumed, _, _ = run(folder, step, **options)
        assert resumed.intermediate_values == whole.intermediate_values, step
        assert resumed.value == whole.value
        assert [len(fold) for fold in resumed.user_attrs["curve"]] == trained, step


def test_a_trial_without_its_checkpoint_is_trained_from_its_start_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _, _ = run(folder, None)
    objective = make(folder, oof_dir=folder / "oof", paused_dir=folder / "paused", per_epoch=2, n_trials=16)
    study = optuna.create_study(direction="minimize", pruner=PauseAt(3), study_name="s")
    study.enqueue_trial(PARAMS)
    study.optimize(objective, n_trials=1)
    shutil.rmtree(folder / "paused" / "0")
    resume(study, study.trials[0], [3])
    study.optimize(objective, n_trials=1)
    assert "the checkpoint of trial 0 was deleted; training starts from the first epoch" in caplog.text
    assert study.trials[1].value == whole.value
    assert study.trials[1].intermediate_values == whole.intermediate_values


@pytest.mark.parametrize("seed", range(5))
def test_a_study_runs_as_the_paper_says(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    curves = [[draw.random() + 0.1 * step for step in range(9)] for _ in range(40)]
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1, 3], 3), study_name="s")
    scheduler = AshaScheduler(study.pruner, 40, tmp_path / "paused")

    def objective(trial: optuna.Trial) -> float:
        point = parameter_set_of(study.get_trials(deepcopy=False)[trial.number])
        parent = trial.user_attrs.get(RESUMES)
        start = 0 if parent is None else study.trials[parent].last_step
        for step in range(1, 10):
            trial.report(curves[points.index(point) if parent is not None else point_number(point)][step - 1], step)
            if start < step < 9 and trial.should_prune():
                trial.set_user_attr(PAUSED_AT, step)
                raise optuna.TrialPruned
        return curves[points.index(point)][-1]

    points: list[int] = []

    def point_number(point: int) -> int:
        if point not in points:
            points.append(point)
        return points.index(point)

    scheduler(study)
    study.optimize(objective, callbacks=[scheduler])
    made = [0] * 40
    for trial in study.trials:
        made[points.index(parameter_set_of(trial))] = trial.last_step
    expected, ended = plain_halving(curves, [1, 3], 3)
    assert made == expected
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == ended > 0
    assert ended_parameter_sets(study.trials) == 40
    assert nothing_left(study, study.pruner, 40)
