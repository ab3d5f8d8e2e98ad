from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from lightning_bge.advisor.report.format import format_duration
from lightning_bge.advisor.report.report import write_report
from lightning_bge.advisor.report.run_data import read_epochs, read_run
from lightning_bge.advisor.report.status import describe_status
from lightning_bge.cli.main import main
from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.runtime.run_folder import write_json
from tests.helpers.audit_sample import AUDIT
from tests.helpers.html_page import page_of
from tests.helpers.made_study import START, Maker, draw, draw_values, journal_of, make_study, new_study

optuna.logging.set_verbosity(optuna.logging.WARNING)

STUDY = ["timeline", "best", "curves"]


def test_a_study_is_shown_as_optuna_has_it(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 40)
    page = page_of(run)
    assert page.figures == STUDY
    study = optuna.load_study(study_name="run", storage=journal_of(run))
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert f"{study.best_value:.4f}" in page.shown
    assert page.traces("best")["best so far"]["y"][-1] == pytest.approx(study.best_value, abs=1e-6)
    shown = page.traces("curves")[f"best: trial {study.best_trial.number}"]
    assert shown["x"] == list(study.best_trial.intermediate_values)
    assert shown["y"] == pytest.approx(list(study.best_trial.intermediate_values.values()), abs=1e-6)
    drawn = {y for trace in page.data["timeline-data"]["data"] for y in trace["y"]}
    assert drawn - {None} == {trial.number for trial in study.trials}
    resumed = {trial.user_attrs["resumes"] for trial in study.trials if "resumes" in trial.user_attrs}
    paused = [t for t in study.trials if t.state == TrialState.PRUNED and t.number not in resumed]
    missing = sum((15 - t.last_step) * _seconds(t) / t.last_step for t in paused)
    assert f"saved (estimate) {format_duration(missing / 3600)}" in page.shown
    best = max(complete, key=lambda trial: trial.value)
    scores = best.user_attrs["fold_scores"]
    row = (
        f"trial {best.number} {best.value:.4f} {np.std(scores, ddof=1):.4f} {', '.join(f'{one:.4f}' for one in scores)}"
    )
    assert f"{row} {next(iter(best.params))} " in page.shown


def _seconds(trial: Any) -> float:
    return sum(report[2] + report[3] for fold in trial.user_attrs["curve"] for report in fold)


def test_a_large_study_is_drawn_with_few_traces(tmp_path: Path) -> None:
    page = page_of(make_study(tmp_path / "run", 400))
    assert page.figures == STUDY
    assert "model.optimizer.lr" in page.shown.split("share of the variance")[1]
    assert all(len(page.data[f"{name}-data"]["data"]) <= 12 for name in page.figures)
    assert "middle 80 %" in " ".join(str(name) for name in page.traces("curves"))
    assert len(page.text) < 5_600_000


@pytest.mark.parametrize(
    ("running", "ended", "missing"),
    [
        (True, [], ["best"]),
        (False, [TrialState.COMPLETE], []),
        (False, [TrialState.FAIL, TrialState.FAIL], ["best", "curves"]),
        (True, [TrialState.PRUNED], ["best"]),
        (False, [], STUDY),
    ],
)
def test_a_study_with_few_results_has_fewer_figures(
    tmp_path: Path, running: bool, ended: list[TrialState], missing: list[str]
) -> None:
    run = tmp_path / "run"
    study, maker = new_study(run, 5), Maker()
    params, distributions = draw(maker.rng)
    drawn = (params, distributions, *draw_values(params, maker.rng), 60.0)
    for state in ended:
        made = {TrialState.COMPLETE: 15, TrialState.PRUNED: 1, TrialState.FAIL: 0}[state]
        scores = {"fold_scores": [0.5] * 5} if state == TrialState.COMPLETE else {}
        maker.add(state, drawn, made, 60.0, scores)
    with Worker(run) as worker:
        if running:
            more = {"datetime_start": START, "datetime_complete": None}
            maker.add(TrialState.RUNNING, drawn, 2, 60.0, {"worker": worker.record}, **more)
        study.add_trials(maker.trials)
        page = page_of(run)
        assert page.figures == [name for name in STUDY if name not in missing]
        assert ("best" in missing) == ("No trial is complete yet" in page.shown or not maker.trials)
        assert ("saved (estimate)" in page.shown) == (TrialState.PRUNED in ended)
        text = describe_status(read_run(run))
        assert ("running (1 trial)" in text) == running
        assert ("no trial is complete yet" in text) == ("best" in missing and bool(maker.trials))


def test_a_trial_whose_process_is_gone_is_not_shown_as_running(tmp_path: Path) -> None:
    run = tmp_path / "run"
    study, maker = new_study(run, 5), Maker()
    params, distributions = draw(maker.rng)
    drawn = (params, distributions, *draw_values(params, maker.rng), 60.0)
    worker = {"id": "gone", "host": "this-one", "pid": 4711}
    more = {"datetime_start": START, "datetime_complete": None}
    maker.add(TrialState.RUNNING, drawn, 2, 60.0, {"worker": worker}, **more)
    study.add_trials(maker.trials)
    for shown in (page_of(run).shown, describe_status(read_run(run))):
        assert "not finished, and no trial is running" in shown


def test_a_single_split_and_a_study_of_two_objectives(tmp_path: Path) -> None:
    run = tmp_path / "run"
    study, maker = new_study(run, 5, folds=1, cost="train_seconds"), Maker()
    for score, cost in ((0.7, 9.0), (0.8, 20.0), (0.6, 12.0)):
        trial = create_trial(
            state=TrialState.COMPLETE,
            values=[score, cost],
            user_attrs={"fold_scores": [score], "curve": [[[n, 0.2 * n, 5.0, 1.0, 5.0, 1.0] for n in (1, 2, 3)]]},
        )
        trial.datetime_start, trial.datetime_complete = maker.span(20.0).values()
        study.add_trial(trial)
    page = page_of(run)
    assert page.figures == ["front", "timeline", "best", "curves"]
    front = page.traces("front")["Pareto front (2)"]
    assert list(zip(front["x"], front["y"], strict=True)) == [(20.0, 0.8), (9.0, 0.7)]
    assert "trial 1 0.8000 0.8000" in page.shown
    assert "train_seconds 20" in describe_status(read_run(run))


def test_names_given_by_the_user_are_escaped(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    run = tmp_path / "run <b>bold</b> & co"
    study = new_study(run, 5, **{"monitor.metric": f"f1{evil}"})
    space = {"model.<i>name": optuna.distributions.CategoricalDistribution(("a", evil))}
    study.set_user_attr("space", {"model.<i>name": {"choices": ["a", evil]}})
    maker = Maker()
    for number in range(12):
        trial = create_trial(
            value=0.1 * number,
            params={"model.<i>name": evil if number > 5 else "a"},
            distributions=space,
            intermediate_values={1: 0.1},
            user_attrs={"fold_scores": [0.1] * 5},
        )
        trial.datetime_start, trial.datetime_complete = maker.span(20.0).values()
        study.add_trial(trial)
    write_json(run / "audit.json", {**AUDIT, "next": evil, "machine": {evil: evil}})
    write_json(run / "summary.json", {"best_params": {evil: evil}, "threshold_note": evil, "metric": evil})
    (run / "best.yaml").write_text(f"# {evil}\nmodel: {json.dumps(evil)}\n")
    page = page_of(run)
    assert evil in page.shown
    assert not any(tag in ("img", "b", "i") and "onerror" in attributes for tag, attributes in page.elements)
    assert "<img" not in page.text.replace(page.scripts[0], "")
    # plotly turns HTML in the texts of a figure into elements
    assert "<img" not in json.dumps(page.data)


SECRETS = {
    "trainer": {"logger": {"init_args": {"api_key": "s3cret-1", "tracking_uri": "https://me:s3cret-2@host/x"}}},
    "hub_token": "s3cret-3",
    "db": {"password": "s3cret-4", "PASSWD": "s3cret-5", "credentials": {"user": "s3cret-6"}},
    "data": {"train_file": "https://host/a.csv?size=3&X-Amz-Signature=s3cret-7&token=s3cret-8"},
    "urls": ["postgresql+psycopg://u:s3cret-9@db/optuna"],
}


def test_no_secret_and_no_text_of_the_users_data_is_shown(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 10)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **SECRETS}))
    (run / "best.yaml").write_text("# https://me:s3cret-0@host\n" + yaml.safe_dump(SECRETS))
    command = ["/bin/lightning-bge", "hpo", "--api-key", "s3cret-a", "--x.token=s3cret-b", "--url=s3://u:s3cret-c@h"]
    command += [
        "--trainer.logger",
        "{class_path: W, init_args: {api_key: s3cret-e}}",
        "--to=ftp://u:s3cret-f@s3cret-g@h",
        "--dsn",
        "password=s3cret-h",
    ]
    write_json(run / "run.json", {"calls": [{"command": command, "model": "https://x:s3cret-d@host/m"}]})
    for name in ("oof.csv", "test.csv", "validation.csv"):
        (run / name).write_text("row,text\n0,the user's own words\n")
    page = page_of(run)
    assert "s3cret" not in page.text
    assert "own words" not in page.text
    assert page.shown.count("(hidden)") > 10
    assert "--api-key '(hidden)' '--x.token=(hidden)'" in page.shown


def test_a_finished_study_with_seed_replicates(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 12)
    trials = [
        {"trial": 6, "values": [0.8, 0.7, 0.9], "mean": 0.8, "spread": 0.1},
        {"trial": 3, "values": [0.9, None, 0.6], "mean": None, "spread": None},
    ]
    replicates = {"seeds": [43, 44], "winner_before": 3, "winner": 6, "missing": 0, "trials": trials}
    count = len(optuna.load_study(study_name="run", storage=journal_of(run)).trials)
    estimate = {
        "corrected": {"value": 0.7654, "low": 0.7111, "high": 0.8222},
        "differences": {"runner_up": {"value": 0.01, "low": -0.02, "high": 0.03, "excludes_zero": False}},
        "n_left_out": 3,
    }
    found = {"n_runs": count, "seed_replicates": replicates, "estimate": estimate, "test": {"f1": 0.7321}}
    more = {"threshold": 0.4321, "majority_baseline": 0.5678, "metric": "f1", "sampler": "tpe"}
    write_json(run / "summary.json", {**found, **more, "best_trial": 6, "best_value": 0.8})
    shown = page_of(run).shown
    for words in (
        "study: finished",
        "0.8000 selected f1, mean over the folds of trial 6; optimistic: it has chosen the winner",
        "0.7654 corrected f1, 0.7111 to 0.8222 (95 %); on rows that did not choose it",
        "0.7321 f1 of the test file, scored once",
        "the second best +0.0100 -0.0200 to +0.0300 no more than noise",
        "Left out of the correction: 3 parameter sets",
        "Not corrected: tpe has drawn later parameter sets",
        "0.432",
        "0.5678",
    ):
        assert words in shown
    assert "trial 6 0.8000 0.1000 0.8000, 0.7000, 0.9000 winner" in shown
    # an inner study of a nested cross-validation has no test file
    write_json(run / "summary.json", {**found, **more, "best_trial": 6, "best_value": 0.8, "test_file": None})
    assert "0.7321 f1 of the rows of the outer fold, scored once" in page_of(run).shown
    assert "trial 3 not every seed has a value 0.9000, none, 0.6000" in shown


def test_a_study_that_was_just_created_and_one_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("")
    assert describe_status(read_run(tmp_path)).endswith(": starting\nno trial has started yet")
    assert "No trial has started yet" in page_of(tmp_path).shown
    study = optuna.create_study(study_name="mine", storage=journal_of(tmp_path))
    for name, value in {"space": {}, "settings": {}, "steps": {"folds": 1, "epochs": 1}}.items():
        study.set_user_attr(name, value)
    with pytest.raises(StudyError, match="expected a study that `lightning-bge hpo` created"):
        write_report(tmp_path)


# ---------------------------------------------------------------------- a training run

LOG = """epoch,step,train_loss,train_tokens_per_s,train_data_wait,val_f1,val_loss,test_f1
0,9,,,,0.5,0.7,
0,9,0.8,4000.0,0.03,,,
1,19,,,,nan,0.6,
1,19,0.6,5000.0,0.01,,,
2,20,,,,0.5,0.7,
2,20,,,,,,0.4
"""


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    run = tmp_path / "fit"
    (run / "logs" / "version_0").mkdir(parents=True)
    (run / "logs" / "version_0" / "metrics.csv").write_text(LOG)
    (run / "config.yaml").write_text("monitor: {metric: f1}\ntrainer: {max_epochs: 2}\n")
    return run


def test_a_training_run_is_shown(trained: Path) -> None:
    assert [epoch["epoch"] for epoch in read_epochs(trained / "logs")] == [0, 1]
    assert describe_status(read_run(trained)).splitlines()[:2] == [
        "training run fit: not finished. If it is not running, run the same command to resume it",
        "epochs     2 of 2 finished",
    ]
    write_json(
        trained / "summary.json",
        {"metric": "f1", "epoch": 1, "validation": {"f1": 0.5, "loss": 0.7}, "test": {"f1": 0.4}, "threshold": 0.25},
    )
    page = page_of(trained)
    assert page.figures == ["losses", "metrics", "tokens"]
    assert page.traces("losses")["train_loss"]["y"] == [0.8, 0.6]
    assert page.traces("metrics")["val_f1"]["x"] == [1]  # the second one is not a number
    for words in (
        "0.5000",
        "0.4000",
        "0.250",
        "at most 3.0% of the training time of an epoch",
        "train_padding is not recorded",
    ):
        assert words in page.shown
    assert "validation f1 0.5000" in describe_status(read_run(trained))
    assert "finished" in describe_status(read_run(trained))


def test_the_epochs_of_a_resumed_run_are_merged(trained: Path) -> None:
    (trained / "logs" / "version_1").mkdir()
    resumed = LOG.replace("1,19", "2,29").replace("0,9", "1,19").replace("0.8,", "0.7,")
    (trained / "logs" / "version_1" / "metrics.csv").write_text(resumed)
    (trained / "logs" / "version_10").mkdir()  # just started
    assert [(epoch["epoch"], epoch["train_loss"]) for epoch in read_epochs(trained / "logs")] == [
        (0, 0.8),
        (1, 0.7),
        (2, 0.6),
    ]


def test_a_training_run_without_a_finished_epoch(trained: Path) -> None:
    (trained / "logs" / "version_0" / "metrics.csv").unlink()
    page = page_of(trained)
    assert page.figures == []
    assert "No epoch has finished yet" in page.shown
    assert len(page.text) < 100_000  # no plotly where there is no figure
    assert "epochs     0 of 2 finished" in describe_status(read_run(trained))


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["nothing", "file", "folder"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    words = {"nothing": "does not exist", "file": "is not a folder", "folder": "has neither of them"}[kind]
    for call in (write_report, read_run):
        with pytest.raises(ConfigError, match=words):
            call(path)
    for command in ("report", "status"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(path)])
        assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_run_shows_its_audit_or_the_command_for_one(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 5)
    assert f"lightning-bge audit -c {run}/config.yaml" in page_of(run).shown
    write_json(run / "audit.json", AUDIT)
    shown = page_of(run).shown
    assert "lightning-bge audit -c" not in shown
    assert AUDIT["next"] in shown


def test_the_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_study(tmp_path / "run", 5)
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_mode & 0o077 == 0  # for its owner alone
