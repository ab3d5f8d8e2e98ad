from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import optuna
import pytest
import yaml

from lightning_bge.advisor.report import status
from lightning_bge.advisor.report.format import format_duration
from lightning_bge.advisor.report.run_data import read_run
from lightning_bge.cli.main import main
from lightning_bge.runtime.run_folder import write_json
from tests.helpers.fake_study import fake_config, run_fake
from tests.helpers.made_study import journal_of, make_study
from tests.helpers.memory_location import memory_location

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_status_of_a_running_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_study(tmp_path / "run", 30, running=True)
    main(["status", str(run)])
    text = capsys.readouterr().out
    assert "study run: running (1 trial)" in text
    assert "of 130 finished" in text
    assert "time left  about" in text
    assert re.search(r"complete, \d+ paused, 1 running; \d+ paused trials were resumed", text)
    assert re.search(r"trial \d+, for 7 min: fold 2 of 5, epoch 2 of 3, step 4 of 15, f1 0\.\d{4}", text)
    assert len(text.splitlines()) < 24
    assert max(map(len, text.splitlines())) <= 120


def test_fewer_trials_than_there_are_already_may_be_asked_for(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 5)
    options = yaml.safe_load((run / "config.yaml").read_text())
    options["hpo"]["n_trials"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    assert "of 1 finished" not in status.describe_status(read_run(run))
    assert re.search(r"trials     \d+ finished: ", status.describe_status(read_run(run)))


def test_the_status_of_a_nested_cross_validation_counts_its_inner_studies(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 5)
    assert "nested" not in status.describe_status(read_run(run))
    options = yaml.safe_load((run / "config.yaml").read_text())
    options.setdefault("hpo", {})["outer_folds"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    for number in (0, 1):
        (run / "outer_folds" / str(number)).mkdir(parents=True)
    write_json(run / "outer_folds" / "0" / "summary.json", {})
    assert "nested     1 of 3 inner studies have results" in status.describe_status(read_run(run))


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_why_trials_failed_and_where_their_tracebacks_are(tmp_path: Path, where: str) -> None:
    def fails(trial: optuna.Trial) -> float:
        if trial.number == 1:
            raise ZeroDivisionError("division by zero")
        return 0.5

    run, location = tmp_path / "run", None if where == "folder" else str(memory_location())
    run_fake(run, fake_config(n_trials=2, files=location), fails)
    (run / "config.yaml").write_text(yaml.safe_dump({"hpo": {"n_trials": 2, "files": location}}))
    text = status.describe_failures(read_run(run))
    assert "trial 1 failed: ZeroDivisionError: division by zero" in text
    assert text.splitlines()[-1] == f"  {location or run}/failures/run-trial-1.txt"
    assert (run / "failures").exists() == (location is None)


def test_a_study_is_watched_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_study(tmp_path / "run", 5)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            ended = optuna.load_study(study_name="run", storage=journal_of(run))
            write_json(run / "summary.json", {"n_runs": len(ended.trials)})

    monkeypatch.setattr(status.time, "sleep", sleep)
    main(["status", str(run), "--watch", "0.5"])
    assert waits == [0.5] * 3
    assert "study run: finished" in capsys.readouterr().out


def test_ctrl_c_ends_watching_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    main(["status", str(make_study(tmp_path / "run", 5)), "--watch", "0.5"])
    shown = capsys.readouterr()
    assert "study run: all trials are finished, but not all results are written" in shown.out
    assert shown.err == ""


def test_the_interval_of_watching_has_to_be_above_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", str(make_study(tmp_path / "run", 5)), "--watch", "0"])
    assert "--watch: expected more than 0 seconds, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "words"),
    [(timedelta(seconds=32), "32 s"), (timedelta(minutes=12), "12 min"), (timedelta(hours=3.44), "3.4 h")],
)
def test_durations_have_a_suitable_unit(time: timedelta, words: str) -> None:
    assert format_duration(time.total_seconds() / 3600) == words
