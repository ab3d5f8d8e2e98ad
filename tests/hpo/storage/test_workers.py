"""Which processes work on a study, and what becomes of the trials of those that are gone."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.storage import workers
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import (
    UNMARKED_SECONDS,
    WORKERS,
    FolderWorkers,
    Worker,
    end_lost_trials,
    kernel_id,
    loss_of,
)
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    NOT_TRAINED,
    PARAMETER_SET,
    PAUSED_AT,
    REPORTS_BEFORE,
    RETRY_OF,
    WORKER,
    WORKER_LOST,
    attempts,
)
from lightning_bge.runtime.compat.optuna import running_trial
from tests.helpers.journal_processes import create, finish, start

optuna.logging.set_verbosity(optuna.logging.WARNING)

# begins a trial as `TrialQueue` does, reports, and never ends
WORKING = """
import sys, time, optuna
from pathlib import Path
from optuna.trial import TrialState, create_trial
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.runtime.compat.optuna import running_trial
run_dir = Path(sys.argv[1])
study = optuna.load_study(study_name="s", storage=open_storage(run_dir / "journal.log"))
worker = Worker(run_dir).__enter__()
x = optuna.distributions.FloatDistribution(0, 1)
trial = running_trial(study, create_trial(
    state=TrialState.RUNNING, params={"x": 0.25}, distributions={"x": x}, user_attrs={"worker": worker.record}
))
trial.report(0.5, 1)
print("ready", flush=True)
sys.stdin.readline()
worker.__exit__(None, None, None)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def study(run_dir: Path) -> optuna.Study:
    return create(run_dir / "journal.log")


@pytest.fixture
def process(study: optuna.Study, run_dir: Path) -> Iterator[Popen[str]]:
    """Another process, at work on trial 0."""
    found = start(WORKING, run_dir)
    yield found
    if found.returncode is None:
        found.kill()
        finish(found)


def kill(process: Popen[str]) -> None:
    """Kill it without reaping it: it stays a zombie, and is dead all the same."""
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


# ---------------------------------------------------------------------- who lives


def test_a_worker_lives_while_it_is_entered_and_leaves_no_file(run_dir: Path) -> None:
    one, other = Worker(run_dir), Worker(run_dir)
    assert one.id != other.id
    assert one.id not in FolderWorkers(run_dir).living()
    assert FolderWorkers(run_dir).living() == set()  # there is not even a folder
    with one:
        assert one.id in FolderWorkers(run_dir).living()
        with other:
            assert FolderWorkers(run_dir).living() == {one.id, other.id}
        assert FolderWorkers(run_dir).living() == {one.id}
    assert one.id not in FolderWorkers(run_dir).living()
    assert list((run_dir / WORKERS).iterdir()) == []
    assert one.record == {"id": one.id, "host": os.uname().nodename, "pid": os.getpid()}


def test_only_the_owner_can_read_who_works(run_dir: Path) -> None:
    with Worker(run_dir) as worker:
        folder = run_dir / WORKERS
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / f"{worker.id}.lock").stat().st_mode & 0o777 == 0o600


def test_a_worker_is_gone_whose_block_raises(run_dir: Path) -> None:
    worker = Worker(run_dir)
    with pytest.raises(ZeroDivisionError), worker:
        raise ZeroDivisionError
    assert worker.id not in FolderWorkers(run_dir).living()


def test_a_killed_process_is_known_to_be_gone_before_it_is_reaped(
    study: optuna.Study, run_dir: Path, process: Popen[str]
) -> None:
    [trial] = study.trials
    worker = trial.user_attrs[WORKER]
    assert (worker["pid"], worker["host"]) == (process.pid, os.uname().nodename)
    assert worker["id"] in FolderWorkers(run_dir).living()
    assert loss_of(trial, FolderWorkers(run_dir).living()) is None
    kill(process)
    assert worker["id"] not in FolderWorkers(run_dir).living()
    assert FolderWorkers(run_dir).living() == set()  # though its file is still there
    assert [path.stem for path in (run_dir / WORKERS).iterdir()] == [worker["id"]]
    assert loss_of(trial, FolderWorkers(run_dir).living()) == f"process {process.pid} on {worker['host']} is gone"


def test_a_moved_folder_keeps_its_workers(study: optuna.Study, run_dir: Path, process: Popen[str]) -> None:
    [trial], moved = study.trials, run_dir.with_name("moved")
    run_dir.rename(moved)
    assert loss_of(trial, FolderWorkers(moved).living()) is None
    kill(process)
    assert loss_of(trial, FolderWorkers(moved).living()) is not None


def test_a_copied_folder_has_no_workers(study: optuna.Study, run_dir: Path, process: Popen[str]) -> None:
    [trial], copied = study.trials, run_dir.with_name("copied")
    shutil.copytree(run_dir, copied)
    assert FolderWorkers(copied).living() == set()
    assert loss_of(trial, FolderWorkers(copied).living()) is not None
    there = optuna.load_study(study_name="s", storage=open_storage(copied / "journal.log"))
    end_lost_trials(there, FolderWorkers(copied), max_worker_deaths=3)
    assert states(there) == [TrialState.FAIL]
    # the first study goes on
    assert loss_of(trial, FolderWorkers(run_dir).living()) is None
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    assert states(study) == [TrialState.RUNNING]


# ---------------------------------------------------------------------- trials of another program


def unmarked(seconds: float) -> FrozenTrial:
    """A running trial that names no worker, so many seconds after its start."""
    trial = create_trial(state=TrialState.RUNNING)
    trial.datetime_start = datetime.now() - timedelta(seconds=seconds)
    return trial


@pytest.mark.parametrize(
    ("seconds", "lost"),
    [
        (0, False),
        (UNMARKED_SECONDS - 10, False),
        (UNMARKED_SECONDS + 1, True),
        (-30, False),  # a clock that was set back a little
        (-3600, True),  # or by an hour, as where a host has another time zone
    ],
)
def test_a_trial_without_a_mark_is_given_a_minute(tmp_path: Path, seconds: float, lost: bool) -> None:
    reason = loss_of(unmarked(seconds), FolderWorkers(tmp_path).living())
    assert (reason is not None) is lost
    if reason is not None:
        assert reason.startswith("no process has marked it ")


def test_a_trial_of_another_program_is_ended_after_its_minute(
    study: optuna.Study, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.ask()
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    assert states(study) == [TrialState.RUNNING]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=UNMARKED_SECONDS + 1)

    monkeypatch.setattr(workers, "datetime", Later)
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    assert states(study) == [TrialState.FAIL]
    assert study.trials[0].user_attrs[WORKER_LOST].startswith("no process has marked it 6")


# ---------------------------------------------------------------------- the trials of workers that are gone

GONE = {"id": f"here-{kernel_id()}-7-gone", "host": "here", "pid": 7}


def begin(study: optuna.Study, **attributes: Any) -> optuna.Trial:
    """A trial whose worker is gone, unless another one is named."""
    return running_trial(study, create_trial(state=TrialState.RUNNING, user_attrs={WORKER: GONE, **attributes}))


def test_the_trial_of_a_killed_process_is_ended_once_with_what_it_had_reported(
    study: optuna.Study, run_dir: Path, process: Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    assert states(study) == [TrialState.RUNNING]
    kill(process)
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    [trial] = study.trials
    assert trial.state == TrialState.FAIL
    assert (trial.params, trial.intermediate_values) == ({"x": 0.25}, {1: 0.5})
    assert trial.user_attrs[WORKER_LOST] == f"process {process.pid} on {os.uname().nodename} is gone"
    assert ERROR not in trial.user_attrs
    assert len(caplog.records) == 1


def test_the_trials_of_living_workers_and_ended_ones_are_left_alone(study: optuna.Study, run_dir: Path) -> None:
    with Worker(run_dir) as worker:
        begin(study, worker=worker.record)
        study.tell(begin(study), 0.5)
        study.enqueue_trial({"x": 0.5})
        end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    assert states(study) == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.WAITING]
    assert not any(WORKER_LOST in trial.user_attrs for trial in study.trials)


def test_a_trial_that_was_about_to_pause_ends_as_paused(study: optuna.Study, run_dir: Path) -> None:
    trial = begin(study)
    trial.report(0.5, 4)
    trial.set_user_attr(PAUSED_AT, 4)
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=1)
    [ended] = study.trials
    assert ended.state == TrialState.PRUNED
    assert ended.user_attrs == {WORKER: GONE, PAUSED_AT: 4}


def attempt(study: optuna.Study, run_dir: Path, *, reports: int = 0, deaths: int = 3, **attributes: Any) -> FrozenTrial:
    """The next attempt at parameter set 0, which reports so often and then loses its process."""
    before = study.get_trials(deepcopy=False)
    taken = len(before[-1].intermediate_values) if before else 0
    more = {PARAMETER_SET: 0, RETRY_OF: before[-1].number, REPORTS_BEFORE: taken} if before else {}
    template = create_trial(
        state=TrialState.RUNNING,
        user_attrs={WORKER: GONE, **more, **attributes},
        intermediate_values=dict(before[-1].intermediate_values) if before else {},
    )
    trial = running_trial(study, template)
    for step in range(taken + 1, taken + reports + 1):
        trial.report(0.5, step)
    end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=deaths)
    return study.trials[-1]


def test_three_deaths_in_a_row_without_a_report_are_an_error(
    study: optuna.Study, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert ERROR not in attempt(study, run_dir).user_attrs
    last = attempt(study, run_dir)
    assert last.state == TrialState.FAIL
    assert last.user_attrs[ERROR] == "3 workers died in a row at this parameter set, with no report in between"
    assert WORKER_LOST in last.user_attrs
    assert "trial 2: 3 workers died in a row" in caplog.text


def test_a_report_in_between_begins_the_count_anew(study: optuna.Study, run_dir: Path) -> None:
    # reports that a trial took over are none of its own
    found = [attempt(study, run_dir, reports=reports) for reports in (0, 0, 1, 0, 0, 0)]
    assert [ERROR in trial.user_attrs for trial in found] == [False] * 5 + [True]
    assert [trial.user_attrs.get(REPORTS_BEFORE, 0) for trial in found] == [0, 0, 0, 1, 1, 1]


def interrupt(study: optuna.Study, reports: int) -> None:
    """An attempt at parameter set 0 that is stopped on request."""
    trial = begin(study, **{PARAMETER_SET: 0, INTERRUPTED: "SIGTERM"})
    for step in range(1, reports + 1):
        trial.report(0.5, step)
    study.tell(trial, state=TrialState.FAIL)


def test_an_interruption_in_between_is_no_death(study: optuna.Study, run_dir: Path) -> None:
    for _ in range(2):
        attempt(study, run_dir)
    for _ in range(4):
        interrupt(study, reports=0)
    assert ERROR in attempt(study, run_dir).user_attrs


def test_a_report_of_an_interrupted_trial_begins_the_count_anew(study: optuna.Study, run_dir: Path) -> None:
    for _ in range(2):
        attempt(study, run_dir)
    interrupt(study, reports=1)
    assert [ERROR in attempt(study, run_dir).user_attrs for _ in range(3)] == [False, False, True]


def test_deaths_at_other_parameter_sets_do_not_count(study: optuna.Study, run_dir: Path) -> None:
    for _ in range(5):
        begin(study)
        end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=2)
    assert states(study) == [TrialState.FAIL] * 5
    assert not any(ERROR in trial.user_attrs for trial in study.trials)


def test_the_number_of_deaths_is_an_option(study: optuna.Study, run_dir: Path) -> None:
    assert ERROR in attempt(study, run_dir, deaths=1).user_attrs


# ---------------------------------------------------------------------- workers under another kernel


@pytest.fixture
def elsewhere(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker of another machine that shares the folder, but not the locks."""
    with monkeypatch.context() as patch:
        patch.setattr(workers, "kernel_id", lambda: "other")
        worker = Worker(run_dir)
    worker.workers.timeout = 0.6
    with worker:
        worker._lock.release()  # a file system whose locks do not reach other machines
        yield worker
        worker._lock.acquire()


def test_a_worker_under_another_kernel_lives_by_its_signs(run_dir: Path, elsewhere: Worker) -> None:
    found = FolderWorkers(run_dir, timeout=2.0)  # of the one who judges: late signs on a busy machine do no harm
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        assert found.living() == {elsewhere.id}
        time.sleep(0.05)
    elsewhere._stop.set()
    while found.living():
        assert time.monotonic() < until + 20
        time.sleep(0.05)


def test_a_worker_whose_file_others_have_removed_goes_on_as_a_new_one(
    run_dir: Path, elsewhere: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    former = elsewhere.id
    elsewhere.renew()
    assert elsewhere.id == former  # nothing has happened
    FolderWorkers(run_dir).forget(former)
    until = time.monotonic() + 20
    while elsewhere.id == former:
        assert time.monotonic() < until
        elsewhere.renew()
        time.sleep(0.02)
    assert "gave no sign of life for more than 1 s" in caplog.text
    assert elsewhere.id in FolderWorkers(run_dir).living()


def test_a_worker_elsewhere_whose_file_is_not_listed_yet_lives(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an NFS client sees a file that another one has just made: its listing of the folder is half a minute old."""
    found, name = FolderWorkers(run_dir, timeout=5.0), "there-other-7-new"
    clock = [100.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    assert found.living({name}) == {name}
    clock[0] += 4.0
    assert found.living({name}) == {name}
    clock[0] += 2.0
    assert found.living({name}) == set()


def test_nobody_elsewhere_is_taken_for_gone_after_a_file_server_was_away(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, name = FolderWorkers(run_dir, timeout=5.0), "there-other-7-slow"
    (run_dir / WORKERS).mkdir(parents=True)
    (run_dir / WORKERS / f"{name}.lock").touch()
    clock, away = [100.0], [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    sign = FolderWorkers._sign

    def slow_sign(self: FolderWorkers, name: str) -> int | None:
        clock[0] += away[0]
        return sign(self, name)

    monkeypatch.setattr(FolderWorkers, "_sign", slow_sign)
    assert found.living() == {name}
    away[0] = 30.0
    assert found.living() == {name}
    away[0] = 0.0
    clock[0] += 4.0
    assert found.living() == {name}
    clock[0] += 2.0
    assert found.living() == set()


def test_a_trial_that_was_created_twice_is_left_out_when_its_twin_has_ended(study: optuna.Study, run_dir: Path) -> None:
    with Worker(run_dir) as worker:
        for _ in range(2):
            running_trial(study, create_trial(state=TrialState.RUNNING, user_attrs=worker.attributes))
        study.tell(1, 0.5)
        end_lost_trials(study, worker.workers, 3)
        assert states(study) == [TrialState.FAIL, TrialState.COMPLETE]
        assert NOT_TRAINED in study.trials[0].user_attrs


def test_a_trial_of_a_worker_that_runs_none_was_created_twice(study: optuna.Study, run_dir: Path) -> None:
    with Worker(run_dir) as worker:
        running_trial(study, create_trial(state=TrialState.RUNNING, user_attrs=worker.attributes))
        end_lost_trials(study, worker.workers, 3)
        assert states(study) == [TrialState.RUNNING]
        end_lost_trials(study, worker.workers, 3, idle=worker.id)
        assert states(study) == [TrialState.FAIL]
        assert NOT_TRAINED in study.trials[0].user_attrs


def test_a_trial_that_was_created_twice_is_left_out(study: optuna.Study, run_dir: Path) -> None:
    with Worker(run_dir) as worker:
        first, second = (begin(study, worker=worker.record) for _ in range(2))
        end_lost_trials(study, FolderWorkers(run_dir), max_worker_deaths=3)
    ended = study.get_trials(deepcopy=False)
    assert ended[first.number].user_attrs[NOT_TRAINED] == "it was created twice"
    assert ended[second.number].state == TrialState.RUNNING
    assert list(attempts(ended)) == [second.number]


def test_looking_at_a_worker_that_has_just_ended_leaves_no_file(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = workers._identity

    def end_after_the_look(path: Path) -> tuple[int, int] | None:
        found = looked(path)
        worker.leave()
        return found

    with Worker(run_dir) as worker:
        monkeypatch.setattr(workers, "_identity", end_after_the_look)
        assert FolderWorkers(run_dir).living() == set()
    assert list((run_dir / WORKERS).iterdir()) == []
