"""Promote: trials pause at rungs, and a resumed one equals one that never paused."""

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
from lightning_bge.hpo.pruning.asha import AshaPruner, nothing_left
from lightning_bge.hpo.pruning.asha_scheduler import AshaScheduler
from lightning_bge.hpo.pruning.asha_trials import (
    PAUSED_AT,
    RESUMES,
    ended_parameter_sets,
    parameter_set_of,
    read_halving,
    resume,
)
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import finished, open_study, run_study
from lightning_bge.hpo.trial.out_of_fold import predictions_file
from lightning_bge.models.metrics import MonitorConfig
from tests.helpers.small_search import SPACE, make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)
PARAMS = {"lr": 3e-3, "dropout": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


class PauseAt(AshaPruner):
    """Pauses a trial's first run at one report."""

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


def plain_halving(curves: list[list[float]], steps: list[int], eta: int) -> tuple[list[int], int]:
    """Asynchronous halving from the paper, one worker: the reports that each point makes, and the point that ends."""
    made, rungs, promoted = [0] * len(curves), [[] for _ in steps], [set() for _ in steps]
    ended: list[int] = []
    ends = [*steps, len(curves[0])]
    new = 0
    while True:
        job = None
        for rung in range(len(steps) - 1, -1, -1):
            top = sorted(rungs[rung], key=lambda p: (-curves[p][steps[rung] - 1], p))[: len(rungs[rung]) // eta]
            job = next(((p, rung + 1) for p in top if p not in promoted[rung]), None)
            if job:
                promoted[rung].add(job[0])
                break
        if job is None and new < len(curves):
            job, new = (new, 0), new + 1
        if job is None:
            return made, len(ended)
        point, level = job
        made[point] = ends[level]
        if level < len(steps):
            rungs[level].append(point)
        else:
            ended.append(point)


@pytest.mark.parametrize("seed", range(5))
def test_a_study_promotes_as_the_paper_says(tmp_path: Path, seed: int) -> None:
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


def search(folder: Path, trials: int, **changes: Any) -> optuna.Study:
    """A whole search with `asha` in its run folder, or what is missing of it."""
    config = StudyConfig(trials, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler="random")
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), {})
    objective = make(folder, paused_dir=folder / "run" / "paused", n_trials=trials, **changes)
    run_study(study, objective, config, "loss", 4, folder / "run" / "paused")
    return study


def kept(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / "run" / "paused").iterdir() if path.is_dir()}


def test_a_search_pauses_resumes_and_keeps_only_what_can_still_be_resumed(folder: Path) -> None:
    study = search(folder, 8)
    trials = study.trials
    assert ended_parameter_sets(trials) == finished(study) == 8
    resumed = [trial for trial in trials if RESUMES in trial.user_attrs]
    assert resumed
    # what each point reported, and what it reports when nothing ever pauses
    whole = optuna.create_study(direction="minimize", study_name="whole")
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            whole.enqueue_trial(trial.params)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    whole.optimize(make(folder), n_trials=len(done))
    assert [trial.value for trial in whole.trials] == [trial.value for trial in done]
    assert [trial.intermediate_values for trial in whole.trials] == [trial.intermediate_values for trial in done]
    # the reports of a point add up to those of an uninterrupted one: nothing is trained twice
    for trial in resumed:
        before = trials[trial.user_attrs[RESUMES]]
        assert trial.user_attrs["curve"][0][0] == before.user_attrs["curve"][0][0]
    resumable = read_halving(trials, (1, 2), 2, sign=-1.0).resumable(8)
    assert kept(folder) <= {trial.number for trial in trials if parameter_set_of(trial) in resumable}
    assert not kept(folder) & {trial.user_attrs[RESUMES] for trial in resumed}
    # a search that is finished stays so
    assert len(search(folder, 8).trials) == len(trials)
    # and goes on where more trials are asked for
    more = search(folder, 10)
    assert ended_parameter_sets(more.trials) == 10


def test_a_resumed_trial_whose_process_dies_is_resumed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []

    class Dies(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            fits.append(trainer.global_step)
            if trainer.global_step and len([step for step in fits if step]) == 1:
                raise SystemExit(1)  # as Lightning makes of Ctrl-C

    with pytest.raises(SystemExit):
        search(folder, 4, extra=(Dies(),))
    study = search(folder, 4, extra=(Dies(),))
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert [RESUMES in trial.user_attrs for trial in failed] == [True]
    again = [trial for trial in study.trials if trial.user_attrs.get("retry_of") == failed[0].number]
    assert [trial.user_attrs[RESUMES] for trial in again] == [failed[0].user_attrs[RESUMES]]
    assert ended_parameter_sets(study.trials) == 4


def test_a_checkpoint_that_is_gone_costs_its_training_and_is_said(
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


def test_the_checkpoints_of_those_that_stand_lowest_give_way_to_the_limit(folder: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1, 2], 4), study_name="s")
    for value in (0.5, 0.9, 0.7):
        trial = study.ask()
        trial.report(value, 1)
        trial.set_user_attr(PAUSED_AT, 1)
        study.tell(trial, state=TrialState.PRUNED)
        (folder / str(trial.number)).mkdir()
        (folder / str(trial.number) / "fold.ckpt").write_bytes(bytes(100))
    for limit, numbers in ((300, {0, 1, 2}), (250, {1, 2}), (100, {1}), (50, set())):
        AshaScheduler(study.pruner, 16, folder, limit)(study)
        assert {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} == numbers


def test_the_checkpoint_of_a_trial_that_waits_to_be_resumed_is_kept_whatever_the_limit(folder: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1], 1), study_name="s")
    trial = study.ask()
    trial.report(0.5, 1)
    trial.set_user_attr(PAUSED_AT, 1)
    study.tell(trial, state=TrialState.PRUNED)
    (folder / "0").mkdir()
    (folder / "0" / "fold.ckpt").write_bytes(bytes(100))
    AshaScheduler(study.pruner, 16, folder, 0)(study)
    assert [one.user_attrs.get(RESUMES) for one in study.trials] == [None, 0]
    assert (folder / "0" / "fold.ckpt").is_file()


def test_a_point_whose_process_dies_each_time_is_given_up(folder: Path) -> None:
    class Dies(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step:
                raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            search(folder, 2, extra=(Dies(),))
    study = search(folder, 2, extra=(Dies(),))  # nothing is left that could go on
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert len({parameter_set_of(trial) for trial in failed}) == 1
    assert len(failed) == 3


@pytest.mark.parametrize("begins", [3, 0])
def test_a_search_that_runs_out_of_time_ends_with_one_complete_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begins: int
) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning_bge.hpo.study.time.monotonic", lambda: now[0])
    config = StudyConfig(100, SPACE, pruner=PrunerConfig("asha", 4, 1), sampler="random", timeout=3600)
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), {})
    trained = make(folder, paused_dir=folder / "run" / "paused", n_trials=100)

    def objective(trial: optuna.Trial) -> Any:
        if trial.number == begins - 1:
            now[0] = 3601.0
            study.stop()
        return trained(trial)

    if not begins:
        monkeypatch.setattr("lightning_bge.hpo.study.gc.freeze", lambda: now.__setitem__(0, 3601.0))
    run_study(study, objective, config, "loss", 4, folder / "run" / "paused")
    assert ended_parameter_sets(study.trials) == begins
    assert [trial.state for trial in study.trials].count(TrialState.COMPLETE) == (begins > 0)
    assert ("the best paused one is resumed" in capsys.readouterr().out) == (begins > 0)


def test_nothing_is_resumed_unearned_while_another_trial_runs_or_waits(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1], 4), study_name="s")
    scheduler = AshaScheduler(study.pruner, 2, tmp_path)
    for value in (0.5, 0.9):
        trial = study.ask()
        trial.report(value, 1)
        trial.set_user_attr(PAUSED_AT, 1)
        running = study.ask() if value == 0.9 else None
        study.tell(trial, state=TrialState.PRUNED)
    scheduler(study)
    assert not any(RESUMES in trial.user_attrs for trial in study.trials)
    assert running is not None
    study.tell(running, state=TrialState.FAIL)
    for _ in range(2):  # the second call finds it waiting
        scheduler(study)
        assert [trial.user_attrs[RESUMES] for trial in study.trials if RESUMES in trial.user_attrs] == [1]
    assert not nothing_left(study, study.pruner, 2)


def test_another_pruner_drops_what_was_paused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    search(folder, 4)
    assert (folder / "run" / "paused").is_dir()
    config = StudyConfig(5, SPACE, pruner=PrunerConfig("none"), sampler="random")
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), {})
    run_study(study, make(folder), config, "loss", 4, folder / "run" / "paused")
    assert finished(study) == 5
    assert not (folder / "run" / "paused").exists()
    assert "deleting trials that another pruner has paused" in caplog.text
