from __future__ import annotations

import inspect
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import DataError, OperationalError, PendingRollbackError

from lightning_bge.errors import StudyError
from lightning_bge.hpo.storage import retrying
from lightning_bge.hpo.storage.retrying import RecentTrialsPruner, Retries, RetryingStorage, reason_of_outage

AWAY = OperationalError("SELECT 1", {}, Exception("connection refused\nIs the server running?"))


class Away(InMemoryStorage):
    """A storage whose calls fail some times: before their effect, or after it, as when the answer is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.failures, self.after = 0, False
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found) or name not in vars(BaseStorage):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            fails, self.failures = self.failures > 0, max(0, self.failures - 1)
            if fails and not self.after:
                raise internal_error(AWAY)
            result = found(*args, **options)
            if fails:
                raise internal_error(AWAY)
            return result

        return call


def internal_error(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("an exception is raised during the commit")
    error.__cause__ = cause
    return error


class RpcError(Exception):
    """As grpc's."""

    def __init__(self, name: str, details: str) -> None:
        self.name, self.text = name, details

    def code(self) -> Any:
        return self

    def details(self) -> str:
        return self.text


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept; the clock goes on by as much."""
    slept: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", slept.append)
    monkeypatch.setattr(retrying.time, "monotonic", lambda: sum(slept))
    return slept


@pytest.fixture
def away() -> Away:
    return Away()


@pytest.fixture
def storage(away: Away) -> RetryingStorage:
    return RetryingStorage(away, Retries("the database", 60.0))


def test_all_public_methods_of_a_storage_are_passed_on(away: Away, storage: RetryingStorage) -> None:
    public = [name for name in vars(BaseStorage) if not name.startswith("_")]
    own = [name for name in public if getattr(RetryingStorage, name) is not getattr(BaseStorage, name)]
    assert own == public
    assert not inspect.isabstract(RetryingStorage)


def test_a_study_goes_on_after_an_outage(
    away: Away, storage: RetryingStorage, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(storage=storage)
    away.failures = 3
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    away.failures = 2
    study.tell(trial, 1.0)
    assert [one.value for one in study.trials] == [1.0]
    assert len(waits) == 5
    assert waits[0] < 0.1 < waits[2] < 0.4  # it doubles
    assert [record.getMessage() for record in caplog.records if record.name == "lightning_bge"] == [
        "the database does not answer: connection refused. Trying again for up to 60 s",
        "the database answers again",
    ] * 2


def test_a_storage_that_stays_away_is_one_error_after_the_patience(
    away: Away, storage: RetryingStorage, waits: list[float]
) -> None:
    away.failures = 1000
    with pytest.raises(StudyError, match=r"the database has not answered for 6\d s: connection refused"):
        storage.get_all_studies()
    assert 60 <= sum(waits) < 66
    assert max(waits) <= retrying.MOST_SECONDS
    before = sum(waits)
    with pytest.raises(StudyError, match="has not answered"):  # what is still to be written does not wait as long
        storage.get_all_studies()
    assert sum(waits) - before < 16


def test_a_process_that_is_to_stop_waits_for_a_few_seconds(
    away: Away, storage: RetryingStorage, waits: list[float]
) -> None:
    away.failures = 1000
    storage.retries.is_stopping = lambda: True
    with pytest.raises(StudyError, match="What was saved is continued"):
        storage.get_all_studies()
    first = sum(waits)
    assert 9 < first <= retrying.STOPPING_SECONDS + 0.01
    with pytest.raises(StudyError, match="has not answered"):  # all calls together: it is tried once
        storage.get_all_studies()
    assert sum(waits) == first


def test_a_request_to_stop_ends_a_long_wait(away: Away, storage: RetryingStorage, waits: list[float]) -> None:
    away.failures = 1000
    storage.retries.is_stopping = lambda: sum(waits) > 30
    with pytest.raises(StudyError, match="has not answered for 4"):
        storage.get_all_studies()
    assert 40 < sum(waits) < 40.6


def test_the_end_of_a_trial_whose_answer_was_lost_is_no_error(away: Away, storage: RetryingStorage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    away.failures, away.after = 1, True
    assert storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    assert study.trials[0].value == 1.0
    with pytest.raises(UpdateFinishedTrialError):  # without an outage it is one
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


def test_another_end_of_a_trial_is_an_error_also_after_an_outage(away: Away, storage: RetryingStorage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    study.tell(trial, state=TrialState.FAIL)
    away.failures = 1
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AWAY, "connection refused"),
        (internal_error(AWAY), "connection refused"),
        (internal_error(DataError("INSERT", {}, Exception("value too long"))), None),
        (OperationalError("", {}, Exception('FATAL: password authentication failed for user "me"')), None),
        (OperationalError("", {}, Exception('FATAL: database "x" does not exist')), None),
        (OperationalError("", {}, Exception("FATAL: the database system is starting up")), "FATAL: the database sys"),
        (RpcError("UNAVAILABLE", "failed to connect\nmore"), "failed to connect"),
        (RpcError("UNKNOWN", "Exception calling application: (psycopg.OperationalError) x"), "the proxy's database"),
        (RpcError("UNKNOWN", "Exception calling application: a bug"), None),
        (RpcError("NOT_FOUND", ""), None),
        (KeyError("x"), None),
        (UpdateFinishedTrialError(), None),
    ],
)
def test_which_errors_are_outages(error: Exception, reason: str | None) -> None:
    found = reason_of_outage(error)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_an_outage_that_optuna_has_gone_on_after_is_one() -> None:
    later = PendingRollbackError("Can't reconnect until invalid transaction is rolled back")
    later.__context__ = AWAY  # as where it is raised while the first one is handled
    assert reason_of_outage(internal_error(later)) == "connection refused"
    assert reason_of_outage(internal_error(PendingRollbackError("without an outage"))) is None


def test_a_call_that_waited_behind_a_proxy_was_an_outage(waits: list[float]) -> None:
    retries = Retries("the proxy", 100.0)
    retries.call(waits.append, 1.0)
    assert retries.last_outage == -float("inf")
    retries.call(waits.append, 30.0)  # the proxy itself has tried again and again
    assert retries.last_outage == sum(waits)


def test_a_storage_that_was_given_up_is_waited_for_again_once_it_has_answered(waits: list[float]) -> None:
    retries = Retries("the database", 100.0)

    def fail() -> None:
        raise internal_error(AWAY)

    for least, most in ((99.0, 110.0), (9.0, 20.0)):  # what is still to be written does not wait as long once more
        before = sum(waits)
        with pytest.raises(StudyError, match="has not answered for"):
            retries.call(fail)
        assert least < sum(waits) - before < most
    retries.call(lambda: None)
    before = sum(waits)
    with pytest.raises(StudyError):
        retries.call(fail)
    assert sum(waits) - before > 99.0


def test_a_proxy_that_has_given_up_is_waited_for() -> None:
    """Its error reaches a client as text."""
    error = StudyError("the database d has not answered for 600 s: connection refused")
    assert reason_of_outage(RpcError("UNKNOWN", f"Exception calling application: {error}")) is not None
    assert reason_of_outage(RpcError("UNKNOWN", "Exception calling application: division by zero")) is None


class Counting(BasePruner):
    """Notes how many complete trials it sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.seen.append(len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))))
        return False


def test_pruners_read_complete_trials_once_a_second(waits: list[float]) -> None:
    inner, pruner = Away(), Counting()
    storage = RetryingStorage(inner, Retries("the database", 100.0))
    study = optuna.create_study(storage=storage, pruner=RecentTrialsPruner(pruner, storage))
    trial = study.ask()

    def complete() -> int:
        trial.report(1.0, len(pruner.seen))
        assert not trial.should_prune()
        return pruner.seen[-1]

    assert complete() == 0
    inner.create_new_trial(0, create_trial(value=1.0))  # of another process
    before = inner.calls.count("get_all_trials")
    assert complete() == 0
    assert inner.calls.count("get_all_trials") == before
    assert len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) == 1  # nobody else is told less
    waits.append(1.5)
    assert complete() == 1
    study.tell(study.ask(), 2.0)  # its own
    assert complete() == 2
