"""Parameter sets that a study tries first: queued once, by whichever process comes first."""

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.storage.workers import sweep, this_worker
from lightning_bge.hpo.study import enqueue_once
from tests.helpers.journal_processes import create, finish, start

optuna.logging.set_verbosity(optuna.logging.WARNING)

ENQUEUER = """
import pathlib, sys, optuna
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.study import enqueue_once
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(enqueue_once(study, [{"x": number / 8} for number in range(8)], pathlib.Path(sys.argv[1])), flush=True)
"""


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "runs" / "study.log"


def test_three_processes_queue_each_parameter_set_once(journal):
    study = create(journal)
    processes = [start(ENQUEUER, journal) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.stdout.readline()) for process in processes]
    for process in processes:
        finish(process)
        assert process.returncode == 0
    assert sorted(counts) == [0, 0, 8]
    assert [trial.user_attrs["enqueued"] for trial in study.trials] == [{"x": number / 8} for number in range(8)]


def test_parameter_sets_are_queued_once_however_their_trials_ended(journal):
    study = create(journal)
    given = [{"x": 0.5}, {"x": 0.25, "y": "a"}]
    assert enqueue_once(study, given, journal) == 2
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    trial.set_user_attr("worker", {**this_worker(), "start": "0"})
    assert len(sweep(study)) == 1
    assert enqueue_once(study, given, journal) == 0
    # a process that was killed in the middle of it has queued a part, and more may be added later
    assert enqueue_once(study, [{"x": 0.75}, *given], journal) == 1
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.WAITING, TrialState.WAITING, TrialState.WAITING]
    assert [trial.system_attrs["fixed_params"] for trial in study.trials[1:]] == [given[1], given[0], {"x": 0.75}]
