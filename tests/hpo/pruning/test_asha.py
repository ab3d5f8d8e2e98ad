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

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trial.out_of_fold import predictions_file
from lightning_bge.hpo.trials import PAUSED_AT, REPORTS_BEFORE, RESUMES, ended_parameter_sets
from lightning_bge.models.metrics.config import MonitorConfig
from tests.helpers import curve_objective
from tests.helpers.curve_objective import CurveObjective
from tests.helpers.plain_halving import plain_halving
from tests.helpers.small_search import SPACE, make, write_files
from tests.helpers.study_run import run_study

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
    folder: Path, step: int | None, params: dict[str, float] = PARAMS, lose: bool = False, **changes: Any
) -> tuple[FrozenTrial, Weights]:
    """One trial with a pause at a step, resumed to its end; `lose`: its checkpoint is deleted while it is paused."""
    weights, run_dir = Weights(), folder / "run"
    checkpoint = run_dir / CHECKPOINTS / "0"
    settings = {"oof_dir": folder / "oof", "paused_dir": checkpoint.parent, "per_epoch": 2, "n_trials": 16, **changes}
    study = optuna.create_study(direction="minimize", pruner=PauseAt(step), study_name="s")

    def paused(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 0 and step is not None:
            assert trial.state == TrialState.PRUNED
            assert trial.user_attrs[PAUSED_AT] == trial.last_step == step
            assert (checkpoint / "state.pt").is_file()
            if lose:
                shutil.rmtree(checkpoint)

    objective = make(folder, (weights,), **settings)
    run_study(study, objective, StudyConfig(1, SPACE), run_dir, enqueued=[params], report=paused)
    assert len(study.trials) == 1 + (step is not None)
    assert not checkpoint.exists()
    return study.trials[-1], weights


@pytest.mark.parametrize("objective", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(folder: Path, objective: Any) -> None:
    monitor = MonitorConfig("loss", objective)
    whole, weights = run(folder, None, monitor=monitor)
    expected = load_file(predictions_file(folder / "oof", whole.number))
    assert whole.state == TrialState.COMPLETE
    for step in range(1, 8):
        resumed, again = run(folder, step, monitor=monitor)
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
    whole, _ = run(folder, None, **options)
    trained = [len(fold) for fold in whole.user_attrs["curve"]]
    assert trained[0] == 4  # reports of the first fold's two epochs, of ten in all
    for step in (1, 2, 3, 4, 10, 12):  # 10: the first fold's reports that early stopping left out
        resumed, _ = run(folder, step, **options)
        assert resumed.intermediate_values == whole.intermediate_values, step
        assert resumed.value == whole.value
        assert [len(fold) for fold in resumed.user_attrs["curve"]] == trained, step


def test_a_trial_without_its_checkpoint_is_trained_from_its_start_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = run(folder, None)
    again, _ = run(folder, 3, lose=True)
    assert "the checkpoint of trial 0 was deleted; training starts from the first epoch" in caplog.text
    assert again.user_attrs[REPORTS_BEFORE] == 0
    assert again.value == whole.value
    assert again.intermediate_values == whole.intermediate_values


@pytest.mark.parametrize("seed", range(5))
def test_a_study_runs_as_the_paper_says(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    curves = [[draw.random() + 0.1 * step for step in range(9)] for _ in range(40)]
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1, 3], 3), study_name="s")
    objective = CurveObjective(curves)
    queue = run_study(
        study, objective, StudyConfig(40, curve_objective.SPACE, sampler=SamplerConfig("random")), tmp_path
    )
    expected, ended = plain_halving(curves, [1, 3], 3)
    assert objective.steps_made(study.trials) == expected
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == ended > 0
    assert ended_parameter_sets(study.trials) == 40
    assert queue.is_finished()


def test_a_search_trains_nothing_twice_and_its_trials_equal_those_that_never_pause(folder: Path) -> None:
    run_dir = folder / "run"
    config = StudyConfig(8, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler=SamplerConfig("random"))
    study = open_study(study_storage(run_dir, config), config, "minimize", Steps(2, 2), {})
    run_study(study, make(folder, paused_dir=run_dir / CHECKPOINTS, n_trials=8), config, run_dir)
    trials = study.trials
    assert ended_parameter_sets(trials) == 8
    resumed = [trial for trial in trials if RESUMES in trial.user_attrs]
    assert resumed
    for trial in resumed:
        before = trials[trial.user_attrs[RESUMES]]
        assert trial.user_attrs[REPORTS_BEFORE] == len(before.intermediate_values)
        # with the seconds that it took: it was not trained again
        assert trial.user_attrs["curve"][0][0] == before.user_attrs["curve"][0][0]
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    whole = optuna.create_study(direction="minimize", study_name="whole")
    config = StudyConfig(len(done), SPACE)
    run_study(whole, make(folder), config, folder / "whole", enqueued=[trial.params for trial in done])
    assert [trial.value for trial in whole.trials] == [trial.value for trial in done]
    assert [trial.intermediate_values for trial in whole.trials] == [trial.intermediate_values for trial in done]
