"""Which trial comes next, and how trials end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.search_space import parse_space, suggest
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.terminator import report_fold_scores
from lightning_bge.hpo.trials import FAILURES, NOT_TRAINED, WORKER_LOST, attempts, key_of
from lightning_bge.runtime.stop import Stopped, StopRequest
from tests.helpers.fake_study import SPACE, fake_config, learning_curve, open_fake, run_fake, value_of

GRID = {"x": {"choices": [1, 2]}, "y": {"choices": [True, False]}}
PARSED = parse_space(SPACE)


def params_of(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


def test_a_study_goes_on_where_it_was_with_what_it_would_have_drawn(tmp_path: Path) -> None:
    for sampler in ("random", "tpe"):
        whole, _ = run_fake(tmp_path / f"whole-{sampler}", fake_config(n_trials=14, sampler={"name": sampler}))
        folder = tmp_path / sampler
        for count in (3, 12, 14, 14):
            study, _ = run_fake(folder, fake_config(n_trials=count, sampler={"name": sampler}))
            assert len(study.trials) == count
        assert params_of(study) == params_of(whole)
        assert len({key_of(params) for params in params_of(study)}) == 14


def test_a_small_space_ends_the_study(tmp_path: Path) -> None:
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=6, space=GRID))
    assert len({key_of(params) for params in params_of(study)}) == len(study.trials) == 4
    study, mine = run_fake(tmp_path / "run", fake_config(n_trials=6, space=GRID))
    assert not mine


def test_enqueued_parameter_sets_come_first_and_once(tmp_path: Path) -> None:
    given = [{"x": 0.5}, {"x": 0.25, "y": 0.75}]
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=3, enqueue=given))
    first, second, _ = params_of(study)
    assert first["x"] == 0.5
    assert second == given[1]
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=6, enqueue=[*given, {"y": 0.125}]))
    assert study.trials[3].params["y"] == 0.125
    assert [trial.user_attrs.get("enqueued") for trial in study.trials] == [*given, None, {"y": 0.125}, None, None]


def test_an_enqueued_parameter_set_that_was_drawn_before_is_not_trained_twice(tmp_path: Path) -> None:
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=4, space=GRID))
    again = [dict(trial.params) for trial in study.trials[:2]]
    _, mine = run_fake(tmp_path / "run", fake_config(n_trials=6, space=GRID, enqueue=again))
    assert not mine


def test_trials_that_another_program_has_queued_are_run_unless_they_were(tmp_path: Path) -> None:
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=1, space=GRID))
    other = {"x": 1 + study.trials[0].params["x"] % 2, "y": True}
    study.enqueue_trial(other)
    study.enqueue_trial(dict(study.trials[0].params))
    study, mine = run_fake(tmp_path / "run", fake_config(n_trials=3, space=GRID))
    assert study.trials[1].params == other
    assert study.trials[1].state == TrialState.COMPLETE
    assert study.trials[2].state == TrialState.FAIL
    assert "was there already" in study.trials[2].user_attrs["not_trained"]
    assert len(attempts(study.trials)) == len(mine) + 1 == 3


def test_paused_trials_are_resumed_with_their_reports(tmp_path: Path) -> None:
    pruner = {"name": "asha", "reduction_factor": 2, "min_resource": 2}
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=12, pruner=pruner), learning_curve(tmp_path / "run"))
    made = attempts(study.trials)
    assert len(made) == 12
    best = max(made.values(), key=lambda tries: value_of(tries[0].params))
    assert best[-1].state == TrialState.COMPLETE
    for trial in study.trials:
        if "resumes" in trial.user_attrs:
            earlier = study.trials[trial.user_attrs["resumes"]]
            assert earlier.intermediate_values.items() < trial.intermediate_values.items()
            assert trial.user_attrs["reports_before"] == len(earlier.intermediate_values)


def test_a_trial_that_fails_does_not_end_the_study(tmp_path: Path) -> None:
    def sometimes(trial: optuna.Trial) -> float:
        params = suggest(trial, PARSED)
        if trial.number in (1, 2):
            raise ZeroDivisionError(f"number {trial.number}\nand more")
        return value_of(params)

    run_dir = tmp_path / "run"
    study, mine = run_fake(run_dir, fake_config(n_trials=4), sometimes)
    assert [trial.state.name for trial in study.trials] == [
        "COMPLETE",
        "FAIL",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
        "COMPLETE",
    ]
    assert study.trials[1].user_attrs["error"] == "ZeroDivisionError: number 1"
    text = (run_dir / FAILURES / "run-trial-1.txt").read_text()
    assert "in sometimes" in text
    assert str(study.trials[1].params) in text
    _, mine = run_fake(run_dir, fake_config(n_trials=4), sometimes)
    assert not mine  # a failed parameter set is not tried once more


def test_too_many_failures_end_the_study(tmp_path: Path) -> None:
    def never(trial: optuna.Trial) -> float:
        suggest(trial, PARSED)
        raise ZeroDivisionError("division by zero")

    with pytest.raises(StudyError, match=r"3 trials have failed, and hpo.max_failures is 2.*2: ZeroDiv"):
        run_fake(tmp_path / "run", fake_config(max_failures=2), never)
    with pytest.raises(StudyError, match="3 trials have failed"):
        run_fake(tmp_path / "run", fake_config(max_failures=2), never)
    _, mine = run_fake(tmp_path / "run", fake_config(max_failures=3, n_trials=2))
    assert len(mine) == 2


@pytest.mark.parametrize("error", [ConfigError("wrong"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_that_the_user_can_fix_ends_the_call_and_the_trial_is_continued(
    tmp_path: Path, error: BaseException
) -> None:
    def fails(trial: optuna.Trial) -> float:
        params = suggest(trial, PARSED)
        if trial.number == 1:
            raise error
        return value_of(params)

    with pytest.raises(type(error)):
        run_fake(tmp_path / "run", fake_config(n_trials=4), fails)
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=4), fails)
    assert study.trials[1].state == TrialState.FAIL
    assert "interrupted" in study.trials[1].user_attrs
    assert study.trials[2].params == study.trials[1].params
    assert study.trials[2].user_attrs["retry_of"] == 1
    whole, _ = run_fake(tmp_path / "whole", fake_config(n_trials=4))
    assert [trial.params for trial in study.trials if trial.number != 1] == params_of(whole)


def test_a_signal_stops_between_trials_and_what_was_stopped_is_continued(tmp_path: Path) -> None:
    def stops(trial: optuna.Trial) -> float:
        params = suggest(trial, PARSED)
        if trial.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped("SIGTERM")
        return value_of(params)

    with StopRequest() as request:
        study, mine = run_fake(tmp_path / "run", fake_config(n_trials=4), stops, request=request)
        assert request.signal == signal.SIGTERM
    assert [trial.state.name for trial in mine] == ["COMPLETE", "FAIL"]
    with pytest.raises(SystemExit) as stop:
        request.leave()
    assert stop.value.code == 143
    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=4))
    assert study.trials[2].user_attrs["retry_of"] == 1
    assert len(attempts(study.trials)) == 4


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_the_timeout_no_trial_begins_unless_none_is_complete(tmp_path: Path) -> None:
    pruner = {"name": "asha", "reduction_factor": 2, "min_resource": 2}
    config = fake_config(n_trials=12, pruner=pruner)
    study, mine = run_fake(tmp_path / "run", config, learning_curve(tmp_path / "run"), timeout=0.0)
    assert not mine
    for _ in range(3):
        study, _ = run_fake(
            tmp_path / "run",
            fake_config(n_trials=3, pruner={**pruner, "reduction_factor": 4}),
            learning_curve(tmp_path / "run"),
        )
    study, mine = run_fake(tmp_path / "run", config, learning_curve(tmp_path / "run"), timeout=0.0)
    assert not mine
    assert any(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_the_terminator_of_optuna_ends_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(trial: optuna.Trial) -> float:
        params = suggest(trial, PARSED)
        value = value_of(params)
        report_fold_scores(trial, [value - 3, value + 3, value - 2, value + 2, value])
        return value

    _, mine = run_fake(tmp_path / "run", fake_config(n_trials=60, terminator=True), noisy)
    assert 20 <= len(mine) < 60
    assert "hpo.terminator: after" in capsys.readouterr().out
    _, mine = run_fake(tmp_path / "run", fake_config(n_trials=60, terminator=True), noisy)
    assert not mine
    with pytest.raises(ConfigError, match=r"hpo.terminator: not with hpo.cost"):
        StudyConfig(cost="train_seconds", terminator=True)


def test_all_processes_follow_a_higher_number_of_trials(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def raises(trial: optuna.Trial) -> float:
        if trial.number == 1:
            trial.study.set_user_attr("n_trials", 5)
        return value_of(suggest(trial, PARSED))

    _, mine = run_fake(run_dir, fake_config(n_trials=3), raises)
    assert len(mine) == 5
    assert open_fake(run_dir, fake_config(n_trials=3)).user_attrs["n_trials"] == 5


@pytest.mark.parametrize("name", ["max_failures", "max_worker_deaths", "workers", "workers_per_device"])
def test_numbers_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"hpo.{name}: expected"):
        StudyConfig(**{name: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("suggested", [False, True])
def test_a_trial_that_was_begun_without_a_mark_does_not_keep_the_study_from_its_end(
    tmp_path: Path, suggested: bool
) -> None:
    """A process of another program was killed between Optuna's `ask` and anything that says who runs the trial."""
    run_dir = tmp_path / "run"
    study, _ = run_fake(run_dir, fake_config(n_trials=2))
    trial = study.ask()
    if suggested:
        suggest(trial, PARSED)
    lines = (run_dir / "journal.log").read_text().splitlines(keepends=True)
    begun = max(i for i, line in enumerate(lines) if json.loads(line)["op_code"] == 4)  # a new trial
    record = json.loads(lines[begun])
    record["datetime_start"] = (datetime.now(UTC) - timedelta(minutes=2)).isoformat()
    lines[begun] = json.dumps(record) + "\n"
    (run_dir / "journal.log").write_text("".join(lines))
    study, _ = run_fake(run_dir, fake_config(n_trials=4))
    assert "no process has marked it" in study.trials[2].user_attrs["worker_lost"]
    assert study.trials[3].user_attrs["retry_of"] == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    if suggested:
        assert study.trials[3].params == trial.params
    assert len(attempts(study.trials)) == 4


def test_what_was_begun_without_the_lock_is_left_out_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have taken over the lock of a process that was suspended while it decided."""
    held = iter([True, False, False])
    real = StudyStorage.lock

    @contextmanager
    def lock(
        self: StudyStorage, worker: Worker | None = None, when_near: object = bool
    ) -> Iterator[Callable[[], bool]]:
        with real(self, worker):
            yield lambda: next(held, True)

    config = fake_config(n_trials=4, enqueue=[{"x": 0.5}, {"x": 0.25}])
    open_fake(tmp_path / "run", config)
    monkeypatch.setattr(StudyStorage, "lock", lock)
    study, mine = run_fake(tmp_path / "run", config)
    left_out = [trial for trial in study.trials if NOT_TRAINED in trial.user_attrs]
    assert [trial.user_attrs[NOT_TRAINED] for trial in left_out] == ["its process had lost the lock"] * 2
    assert {trial.state for trial in left_out} == {TrialState.FAIL}
    assert len(mine) == len(attempts(study.trials)) == 4
    # the enqueued parameter sets are tried all the same
    assert [tries[0].params["x"] for tries in attempts(study.trials).values()][:2] == [0.5, 0.25]


def test_a_trial_that_another_process_has_ended_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where this process gave no sign of life for too long."""

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            trial.set_user_attr(WORKER_LOST, "process 7 is gone")
            trial.study.tell(trial.number, state=TrialState.FAIL)
            trial.report(0.5, 1)
            raise AssertionError("it can be reported no more")
        return value_of(suggest(trial, PARSED))

    study, _ = run_fake(tmp_path / "run", fake_config(n_trials=3), objective)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].params == study.trials[1].params  # it was continued
    assert "trial 1 was ended by another process" in caplog.text
