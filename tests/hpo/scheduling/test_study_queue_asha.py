"""Paused trials are resumed when their turn comes, and checkpoints are kept only as long as they may be needed."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.asha_trials import SETTLED_RUNGS
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling import trial_queue
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.storage.workers import Worker, kernel_id
from lightning_bge.hpo.study import study_storage
from lightning_bge.hpo.trial.checkpoint import STATE, save_trial
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    PARAMETER_SET,
    PAUSED_AT,
    REPORTS_BEFORE,
    RESUMES,
    RETRY_OF,
    WORKER,
    WORKER_LOST,
    attempts,
    ended_parameter_sets,
    parameter_set_of,
)
from lightning_bge.runtime import locations
from lightning_bge.runtime.compat.optuna import running_trial, trial_id_of
from lightning_bge.runtime.locations import file_sizes
from lightning_bge.runtime.run_folder import write_text
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.curve_objective import SPACE, CurveObjective
from tests.helpers.memory_location import memory_location
from tests.helpers.study_run import run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
X = parse_space(SPACE)["x"]
GONE = {"id": f"here-{kernel_id()}-7-gone", "host": "here", "pid": 7}


def study_of(rungs: list[int], factor: int) -> optuna.Study:
    return optuna.create_study(direction="maximize", pruner=AshaPruner(rungs, factor), study_name="s")


def config_of(n_trials: int, **more: Any) -> StudyConfig:
    return StudyConfig(n_trials, SPACE, sampler=SamplerConfig("random"), **more)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path) as found:
        yield found


def queue_of(
    study: optuna.Study, worker: Worker, run_dir: Path, n_trials: int, paused_gb: float | None = None, **more: Any
) -> StudyQueue:
    config = config_of(n_trials, pruner=PrunerConfig("asha", paused_gb=paused_gb), **more)
    return StudyQueue(study, study_storage(run_dir, config), worker, config, parse_space(SPACE))


def pause(study: optuna.Study, value: float, at: int = 1) -> None:
    """A parameter set that has paused."""
    template = create_trial(
        state=TrialState.PRUNED,
        params={"x": random.Random(value).random()},
        distributions={"x": X},
        intermediate_values=dict.fromkeys(range(1, at + 1), value),
        user_attrs={PAUSED_AT: at, WORKER: GONE, "pruned_at": at, "fold": 0, "epoch": 0, "curve": [[]]},
        system_attrs={SETTLED_RUNGS: 1},
    )
    study.add_trial(template)


def write_checkpoint(run_dir: Path, number: int, step: int = 1, size: int = 0) -> Path:
    """What a paused trial leaves, with a file of so many bytes more."""
    folder = run_dir / CHECKPOINTS / str(number)
    save_trial(folder, step=step, folds=[], curve=[[]])
    (folder / "fold.ckpt").write_bytes(bytes(size))
    return folder


def kept(run_dir: Path) -> set[int]:
    return {int(path.name) for path in (run_dir / CHECKPOINTS).iterdir() if path.name.isdecimal()}


def begun(queue: StudyQueue) -> FrozenTrial:
    """The next trial, which has to be there."""
    trial = queue.begin(queue.tries())
    assert trial is not None
    return queue.study.get_trials(deepcopy=False)[trial.number]


# ---------------------------------------------------------------------- what is resumed, and how


def test_a_resumed_trial_takes_over_the_parameters_and_the_reports_of_the_paused_one(
    tmp_path: Path, worker: Worker
) -> None:
    study = study_of([1, 4, 16], 4)
    for value in (0.1, 0.9, 0.2, 0.3):
        pause(study, value, at=4)
    write_checkpoint(tmp_path, 1, step=4)
    found, paused = begun(queue_of(study, worker, tmp_path, 8)), study.trials[1]
    assert (found.state, found.params, found.distributions) == (TrialState.RUNNING, paused.params, {"x": X})
    assert found.intermediate_values == paused.intermediate_values
    # nothing of how the paused one ended
    taken = {RESUMES: 1, PARAMETER_SET: 1, SETTLED_RUNGS: 2, REPORTS_BEFORE: 4}
    assert found.user_attrs == {**taken, WORKER: worker.record}
    assert SETTLED_RUNGS not in found.system_attrs


def test_a_resumed_trial_begins_anew_where_its_checkpoint_is_gone_and_passes_the_rungs_that_it_had_passed(
    tmp_path: Path, worker: Worker
) -> None:
    study = study_of([1, 3], 2)
    for value in (0.1, 0.9):
        pause(study, value, at=3)
    found = begun(queue_of(study, worker, tmp_path, 2))
    assert (found.user_attrs[RESUMES], found.user_attrs[REPORTS_BEFORE], found.intermediate_values) == (1, 0, {})
    trial = optuna.Trial(study, trial_id_of(found))
    for step in range(1, 5):
        trial.report(0.0, step)
        assert not trial.should_prune()


def test_a_trial_that_is_continued_is_asked_at_the_rungs_that_it_has_not_reached(
    tmp_path: Path, worker: Worker
) -> None:
    study = study_of([1, 3], 4)
    for value in (0.3, 0.2, 0.1):
        pause(study, value, at=3)
    lost = create_trial(
        state=TrialState.FAIL,
        params={"x": 0.5},
        distributions={"x": X},
        intermediate_values=dict.fromkeys(range(1, 6), 0.0),
        user_attrs={WORKER: GONE, WORKER_LOST: "process 7 is gone"},
        system_attrs={SETTLED_RUNGS: 2},  # both rungs, in the steps that were not saved
    )
    study.add_trial(lost)
    write_checkpoint(tmp_path, 3, step=2)
    found = begun(queue_of(study, worker, tmp_path, 4))
    taken = {RETRY_OF: 3, PARAMETER_SET: 3, SETTLED_RUNGS: 1, REPORTS_BEFORE: 2}
    assert found.user_attrs == {**taken, WORKER: worker.record}
    assert found.intermediate_values == {1: 0.0, 2: 0.0}
    trial = optuna.Trial(study, trial_id_of(found))
    assert not trial.should_prune()
    trial.report(0.0, 3)
    assert trial.should_prune()


def test_lost_trials_go_first_then_paused_ones_then_new_ones(tmp_path: Path, worker: Worker) -> None:
    study = study_of([1], 2)
    for value in (0.1, 0.9):
        pause(study, value)
    lost = {WORKER: GONE, WORKER_LOST: "process 7 is gone"}
    study.add_trial(create_trial(state=TrialState.FAIL, params={"x": 0.5}, distributions={"x": X}, user_attrs=lost))
    queue = queue_of(study, worker, tmp_path, 4)
    first, second, third = begun(queue), begun(queue), begun(queue)
    assert first.user_attrs[RETRY_OF] == 2
    assert second.user_attrs[RESUMES] == 1
    assert parameter_set_of(third) == third.number
    assert queue.begin(queue.tries()) is None  # four parameter sets


def test_nothing_outside_the_top_share_is_resumed_while_another_trial_runs_or_is_left(
    tmp_path: Path, worker: Worker
) -> None:
    study = study_of([1], 4)
    for value in (0.5, 0.9):
        pause(study, value)
    template = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record})
    running, queue = running_trial(study, template), queue_of(study, worker, tmp_path, 3)
    assert queue.begin(queue.tries()) is None
    assert queue.is_finished()  # by now: what runs may leave more
    running.set_user_attr(WORKER_LOST, "process 7 is gone")
    study.tell(running, state=TrialState.FAIL)
    assert not queue.is_finished()
    retry = begun(queue)
    assert (retry.user_attrs[RETRY_OF], queue.begin(queue.tries())) == (2, None)
    study.tell(retry.number, 0.1, state=TrialState.COMPLETE)
    assert queue.begin(queue.tries()) is None  # one is complete, and no other is in the top quarter
    assert queue.is_finished()


def test_a_failed_parameter_set_is_replaced_and_then_the_best_paused_one_is_resumed(
    tmp_path: Path, worker: Worker
) -> None:
    study = study_of([1], 4)
    for value in (0.5, 0.9):
        pause(study, value)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={ERROR: "ValueError: x"}))
    queue = queue_of(study, worker, tmp_path, 3)
    new = begun(queue)
    assert parameter_set_of(new) == new.number == 3
    assert queue.begin(queue.tries()) is None
    study.tell(new.number, state=TrialState.PRUNED)  # out of memory
    assert begun(queue).user_attrs[RESUMES] == 1
    assert queue.begin(queue.tries()) is None


def test_a_process_waits_for_the_trial_of_another_and_resumes_what_it_leaves(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of([1], 4)
    for value in (0.5, 0.9):
        pause(study, value)
    waited: list[float] = []
    with Worker(tmp_path) as other:
        template = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: other.record})
        running = running_trial(study, template)

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            running.report(0.7, 1)
            running.set_user_attr(PAUSED_AT, 1)
            study.tell(running, state=TrialState.PRUNED)

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        monkeypatch.setattr(trial_queue, "time", clock)
        found = queue_of(study, worker, tmp_path, 3).next(math.inf, StopRequest())
    assert len(waited) == 1
    assert found is not None
    assert found.user_attrs[RESUMES] == 1


# ---------------------------------------------------------------------- whole searches


def curves_of(count: int) -> list[list[float]]:
    draw = random.Random(0)
    return [[draw.random() + 0.1 * step for step in range(9)] for _ in range(count)]


def test_a_finished_search_stays_so_and_goes_on_where_more_trials_are_asked_for(tmp_path: Path) -> None:
    study, objective = study_of([1, 3], 3), CurveObjective(curves_of(14))
    queue = run_study(study, objective, config_of(10), tmp_path)
    assert ended_parameter_sets(study.trials) == 10
    assert queue.is_finished()
    before = len(study.trials)
    run_study(study, objective, config_of(10), tmp_path)
    assert len(study.trials) == before
    run_study(study, objective, config_of(14), tmp_path)
    assert ended_parameter_sets(study.trials) == 14


def test_a_resumed_trial_that_is_interrupted_is_resumed_again(tmp_path: Path) -> None:
    study, curves = study_of([1, 3], 3), CurveObjective(curves_of(9))

    def objective(trial: optuna.Trial) -> float:
        if RESUMES in trial.user_attrs and not any(INTERRUPTED in one.user_attrs for one in study.trials):
            raise SystemExit(1)  # as Lightning makes of Ctrl-C
        return curves(trial)

    with pytest.raises(SystemExit):
        run_study(study, objective, config_of(9), tmp_path)
    run_study(study, objective, config_of(9), tmp_path)
    [failed] = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    [again] = [trial for trial in study.trials if trial.user_attrs.get(RETRY_OF) == failed.number]
    assert again.user_attrs[RESUMES] == failed.user_attrs[RESUMES]
    assert parameter_set_of(again) == parameter_set_of(failed)
    assert INTERRUPTED not in again.user_attrs
    assert ended_parameter_sets(study.trials) == 9


def test_a_resumed_trial_that_raises_an_error_is_not_tried_once_more_and_the_search_goes_on(tmp_path: Path) -> None:
    study, curves = study_of([1, 3], 3), CurveObjective(curves_of(10))

    def objective(trial: optuna.Trial) -> float:
        if RESUMES in trial.user_attrs and not any(ERROR in one.user_attrs for one in study.trials):
            raise ZeroDivisionError
        return curves(trial)

    run_study(study, objective, config_of(9), tmp_path)
    [failed] = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    tries = attempts(study.trials)
    assert tries[parameter_set_of(failed)][-1].number == failed.number
    assert len(tries) == 10  # another one in its place
    assert TrialState.COMPLETE in {trial.state for trial in study.trials}


def test_a_search_whose_resumed_trials_all_fail_ends_with_an_error(tmp_path: Path) -> None:
    study, curves = study_of([1], 2), CurveObjective(curves_of(40))

    def objective(trial: optuna.Trial) -> float:
        if RESUMES in trial.user_attrs:
            raise ZeroDivisionError
        return curves(trial)

    study.pruner = PausesAlways([1], 2)
    with pytest.raises(StudyError, match=r"3 trials have failed, and hpo\.max_failures is 2"):
        run_study(study, objective, config_of(9, max_failures=2), tmp_path)
    assert sum(trial.state == TrialState.FAIL for trial in study.trials) == 3


class PausesAlways(AshaPruner):
    """Pauses at the first rung also what would be resumed next."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        super().prune(study, trial)
        return trial.last_step == self.steps[0] and RESUMES not in trial.user_attrs


# ---------------------------------------------------------------------- the time is over


@pytest.mark.parametrize("begins", [3, 0])
def test_a_search_that_runs_out_of_time_ends_with_one_complete_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begins: int
) -> None:
    now = [0.0 if begins else 3601.0]
    monkeypatch.setattr(trial_queue, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=pytest.fail))
    study, curves = study_of([1, 3], 4), CurveObjective([[0.1] * 9, [0.3] * 9, [0.2] * 9])

    def objective(trial: optuna.Trial) -> float:
        if trial.number == begins - 1:
            now[0] = 3601.0
        return curves(trial)

    run_study(study, objective, config_of(100), tmp_path, until=3600.0)
    assert ended_parameter_sets(study.trials) == begins
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert [parameter_set_of(trial) for trial in complete] == ([1] if begins else [])
    assert ("the best paused one is resumed" in capsys.readouterr().out) == (begins > 0)
    if begins:
        assert curves.decisions[-1] == ("complete", 1, 2)


def test_a_lost_trial_is_continued_after_the_time_where_none_is_complete(tmp_path: Path, worker: Worker) -> None:
    study = study_of([1], 4)
    pause(study, 0.5)
    queue = queue_of(study, worker, tmp_path, 9)
    lost = {WORKER: GONE, WORKER_LOST: "process 7 is gone"}
    study.add_trial(create_trial(state=TrialState.FAIL, params={"x": 0.5}, distributions={"x": X}, user_attrs=lost))
    trial = queue.last_resort(queue.tries())
    assert trial is not None
    assert trial.user_attrs[RETRY_OF] == 1
    assert queue.last_resort(queue.tries()) is None  # it runs
    study.tell(trial.number, 0.5)
    assert queue.last_resort(queue.tries()) is None  # it is complete


# ---------------------------------------------------------------------- checkpoints


def test_the_checkpoints_of_the_lowest_ranked_are_deleted_beyond_the_limit(tmp_path: Path, worker: Worker) -> None:
    study = study_of([1, 2], 4)
    for number, value in enumerate((0.5, 0.9, 0.7)):
        pause(study, value)
        write_checkpoint(tmp_path, number)
    size = sum(path.stat().st_size for path in (tmp_path / CHECKPOINTS / "0").iterdir())
    (tmp_path / CHECKPOINTS / "other").mkdir()
    for room, numbers in ((3, {0, 1, 2}), (2.5, {1, 2}), (1, {1}), (0.5, set())):
        queue = queue_of(study, worker, tmp_path, 16, paused_gb=(room * size + 1) / 2**30)
        queue.clear(queue.tries())
        assert kept(tmp_path) == numbers
    assert (tmp_path / CHECKPOINTS / "other").is_dir()


def test_checkpoints_elsewhere_are_limited_by_the_option_alone(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, at = study_of([1, 2], 4), memory_location()
    for number, value in enumerate((0.5, 0.9, 0.7)):
        pause(study, value)
        save_trial(at / CHECKPOINTS / str(number), step=1, folds=[], curve=[[]])
    write_text(at / CHECKPOINTS / "other" / "0" / STATE, "of another study, such as the seed replicates")
    monkeypatch.setattr(trial_queue.shutil, "disk_usage", pytest.fail)
    size = file_sizes(at)[f"{CHECKPOINTS}/0/{STATE}"]
    for room, numbers in ((None, {"0", "1", "2"}), (2.5, {"1", "2"}), (0.5, set())):
        paused_gb = None if room is None else (room * size + 1) / 2**30
        queue = queue_of(study, worker, tmp_path, 16, paused_gb=paused_gb, files=str(at))
        queue.clear(queue.tries())
        assert {name.split("/")[1] for name in file_sizes(at)} == {*numbers, "other"}
    assert not (tmp_path / CHECKPOINTS).exists()


def test_without_a_limit_checkpoints_may_take_a_quarter_of_the_free_disk(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of([1, 2], 4)
    for number, value in enumerate((0.5, 0.9, 0.7)):
        pause(study, value)
        write_checkpoint(tmp_path, number, size=10**6)
    queue = queue_of(study, worker, tmp_path, 16)
    for free, numbers in ((10**8, {0, 1, 2}), (6 * 10**6, {1, 2}), (0, set())):
        monkeypatch.setattr(trial_queue.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        queue.clear(queue.tries())
        assert kept(tmp_path) == numbers


def test_what_can_never_be_resumed_has_no_checkpoint(tmp_path: Path, worker: Worker) -> None:
    study = study_of([1], 4)
    for number in range(8):
        pause(study, -float(number))
        write_checkpoint(tmp_path, number)
    queue = queue_of(study, worker, tmp_path, 64)
    queue.clear(queue.tries())
    assert kept(tmp_path) == set(range(8))
    queue = queue_of(study, worker, tmp_path, 16)  # of which at most four train on
    queue.clear(queue.tries())
    assert kept(tmp_path) == {0, 1, 2, 3}


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.FAIL])
def test_the_checkpoint_of_what_runs_or_is_to_be_continued_is_kept_whatever_the_limit(
    tmp_path: Path, worker: Worker, state: TrialState
) -> None:
    study = study_of([1], 1)
    pause(study, 0.5)
    folder = write_checkpoint(tmp_path, 0, size=100)
    lost = {WORKER_LOST: "process 7 is gone"} if state == TrialState.FAIL else {}
    study.add_trial(create_trial(state=state, user_attrs={RESUMES: 0, PARAMETER_SET: 0, WORKER: GONE, **lost}))
    queue = queue_of(study, worker, tmp_path, 16, paused_gb=0)
    queue.clear(queue.tries())
    assert (folder / STATE).is_file()
    assert (folder / "fold.ckpt").stat().st_size == 100


def test_the_checkpoint_of_what_has_ended_or_failed_is_deleted(tmp_path: Path, worker: Worker) -> None:
    study = study_of([1], 1)
    for number in range(2):
        pause(study, 0.5)
        write_checkpoint(tmp_path, number)
    study.add_trial(create_trial(value=0.5, user_attrs={RESUMES: 0, PARAMETER_SET: 0}))
    error = {RESUMES: 1, PARAMETER_SET: 1, ERROR: "ValueError: x"}
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=error))
    queue = queue_of(study, worker, tmp_path, 16)
    queue.clear(queue.tries())
    assert kept(tmp_path) == set()


def test_another_pruner_deletes_the_checkpoints_of_paused_trials_which_stay_pruned(tmp_path: Path) -> None:
    study = study_of([1], 4)
    pause(study, 0.5)
    write_checkpoint(tmp_path, 0)
    study.pruner = optuna.pruners.NopPruner()
    run_study(study, lambda trial: 0.5, config_of(3, pruner=PrunerConfig("none")), tmp_path)
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.COMPLETE]
    assert kept(tmp_path) == set()


def test_checkpoints_that_another_process_deletes_meanwhile_do_no_harm(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of([1], 4)
    pause(study, 0.5)
    folder, walk = write_checkpoint(tmp_path, 0, size=100), locations.os.walk

    def gone(place: Path) -> Any:
        found = list(walk(place))
        (folder / "fold.ckpt").unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(locations.os, "walk", gone)
    queue = queue_of(study, worker, tmp_path, 16)
    queue.clear(queue.tries())
    assert kept(tmp_path) == {0}
