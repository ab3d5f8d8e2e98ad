from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.analysis.history import PastTrial
from lightning_bge.hpo.analysis.hours import StudyClock, best_over_hours, hours_saved, time_left
from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.forecast.eta import Eta
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.trials import WORKER
from tests.helpers.made_study import START, make_study, new_study
from tests.helpers.past_study import complete, options_of, past, study_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


def curve(seconds: float, *steps: int) -> tuple[tuple[Report, ...], ...]:
    return (tuple(Report(step, 0.5, 0.75 * seconds, 0.25 * seconds, 0.0, 0.0) for step in steps),)


def test_hours_count_once_where_trials_run_side_by_side_and_not_between_them() -> None:
    running = past(3, "running", 22, end=0)
    running = PastTrial(3, "running", running.start)
    died = PastTrial(4, "interrupted", START + timedelta(hours=5))
    clock = StudyClock(
        study_of(past(0, start=0, end=2), past(1, start=1, end=3), past(2, start=10, end=11), running, died)
    )
    assert clock.hours() == pytest.approx(3 + 1 + 2)
    for hour, hours in ((-1, 0), (0, 0), (1.5, 1.5), (3, 3), (7, 3), (10.5, 3.5), (23, 5), (30, 6)):
        assert clock.hours(START + timedelta(hours=hour)) == pytest.approx(hours)
    assert StudyClock(study_of()).hours() == 0


@pytest.mark.parametrize(("direction", "numbers"), [("maximize", [0, 2]), ("minimize", [0, 1])])
def test_the_best_so_far(direction: str, numbers: list[int]) -> None:
    values = [0.5, 0.4, 0.6, 0.6]
    trials = [complete(n, value, start=n, end=n + 1) for n, value in enumerate(values)]
    found = best_over_hours(study_of(*trials, past(4, "paused", 4, 5), direction=direction))
    assert [trial.number for _, trial in found] == numbers
    assert [hours for hours, _ in found] == [number + 1 for number in numbers]


def test_hours_saved_are_the_missing_steps_at_the_seconds_per_step_of_each_trial() -> None:
    one = past(0, "paused", values={1: 0.1, 2: 0.2}, curve=curve(3600, 1, 2))  # 4 of 6 are missing, an hour each
    two = past(1, "pruned", values={3: 0.1}, curve=curve(1800, 1, 2, 3))  # 3 of 6, half an hour each
    on = past(2, "resumed", values={1: 0.1}, curve=curve(3600, 1))
    oom = past(4, "out of memory", values={1: 0.1}, curve=curve(3600, 1))
    found = hours_saved(study_of(one, two, on, oom, complete(5, 0.1), PastTrial(6, "running", START)))
    assert found.saved == pytest.approx(4 * 1 + 3 * 0.5)
    assert (found.spent, found.trials) == (pytest.approx(5), 2)
    # two steps share one validation where an epoch has fewer batches than parts
    skipped = past(0, "paused", values={1: 0.1, 2: 0.1}, curve=curve(3600, 2))
    assert hours_saved(study_of(skipped)).saved == pytest.approx(4 * 0.5)


def left(run_dir: Path) -> Eta | None:
    loaded = load_study(run_dir)
    assert loaded is not None
    return time_left(*loaded, options_of(run_dir))


def test_the_time_left_is_known_when_something_runs_and_something_has_ended(tmp_path: Path) -> None:
    eta = left(make_study(tmp_path / "running", 40, running=True))
    assert eta is not None
    assert 0 < eta.low <= eta.mid <= eta.high
    assert left(make_study(tmp_path / "ended", 10)) is None
    (tmp_path / "running" / "config.yaml").write_text("hpo: {}")
    assert left(tmp_path / "running") is None
    study = new_study(tmp_path / "first", 5)
    with Worker(tmp_path / "first") as worker:
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record}))
        assert left(tmp_path / "first") is None


def test_trials_of_workers_that_are_gone_are_left_to_be_done_by_those_that_live(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    study = new_study(run_dir, 20)
    (run_dir / "config.yaml").write_text("hpo: {n_trials: 20, pruner: {name: none}, refit: false}")
    for number in range(8):
        trial = create_trial(value=0.5, intermediate_values=dict.fromkeys(range(1, 16), 0.5))
        trial.datetime_start = START + timedelta(hours=number)
        trial.datetime_complete = START + timedelta(hours=number + 1)
        study.add_trial(trial)
    gone = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: {"id": "gone", "host": "here", "pid": 7}})
    gone.datetime_start = datetime.now() - timedelta(hours=1)
    with Worker(run_dir) as worker:
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record}))
        before = left(run_dir)
        for _ in range(3):
            study.add_trial(gone)
        after = left(run_dir)
    assert before is not None
    assert after is not None
    assert after.mid == pytest.approx(before.mid, rel=0.05)
    assert left(run_dir) is None
