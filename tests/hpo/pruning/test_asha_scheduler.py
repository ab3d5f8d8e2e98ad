"""Paused trials of a whole search are resumed, and checkpoints are kept only as long as they may be needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch import Callback
from optuna.trial import TrialState

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner, nothing_left
from lightning_bge.hpo.pruning.asha_scheduler import AshaScheduler
from lightning_bge.hpo.pruning.asha_trials import (
    PAUSED_AT,
    RESUMES,
    ended_parameter_sets,
    parameter_set_of,
    read_halving,
)
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import finished, open_study, run_study
from tests.helpers.small_search import SPACE, make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)
PARAMS = {"lr": 3e-3, "dropout": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def search(folder: Path, trials: int, **changes: Any) -> optuna.Study:
    """A whole search with asha in its run folder, or the rest of an unfinished one."""
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


def test_the_checkpoints_of_the_lowest_ranked_are_deleted_beyond_the_limit(folder: Path) -> None:
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


def test_the_checkpoint_of_a_queued_trial_is_kept_whatever_the_limit(folder: Path) -> None:
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


def test_a_parameter_set_that_fails_each_time_is_given_up(folder: Path) -> None:
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


def test_nothing_outside_the_top_share_is_resumed_while_another_trial_runs_or_is_queued(tmp_path: Path) -> None:
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


def test_another_pruner_deletes_paused_trials(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    search(folder, 4)
    assert (folder / "run" / "paused").is_dir()
    config = StudyConfig(5, SPACE, pruner=PrunerConfig("none"), sampler="random")
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), {})
    run_study(study, make(folder), config, "loss", 4, folder / "run" / "paused")
    assert finished(study) == 5
    assert not (folder / "run" / "paused").exists()
    assert "deleting trials that another pruner has paused" in caplog.text
