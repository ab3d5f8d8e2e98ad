from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from lightning_bge.advisor.audit.page import audit_section
from lightning_bge.advisor.html.page import Section, write_page
from lightning_bge.advisor.html.theme import DARK, OUTCOMES, SERIES, counted
from lightning_bge.advisor.report import status
from lightning_bge.advisor.report.format import MEANS, ORDER, duration
from lightning_bge.advisor.report.report import write_report
from lightning_bge.advisor.report.run_data import clean, clean_command, read_epochs, without_secrets
from lightning_bge.advisor.report.status import describe_status, watch_status
from lightning_bge.cli.main import main
from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.runtime.run_folder import write_json
from tests.helpers.audit_sample import AUDIT
from tests.helpers.made_study import START, Maker, draw, make_study, new_study, reports

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Page(HTMLParser):
    """What a page holds: its elements, its words, its scripts, the data of its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.words.append(data)
        elif self._inside[1].get("type") == "application/json":
            self.data[str(self._inside[1]["id"])] = json.loads(data)
        elif self._inside[0] == "script":
            self.scripts.append(data)

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def figures(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if attributes.get("class") == "plot"]

    def traces(self, figure: str) -> dict[str, Any]:
        return {trace.get("name"): trace for trace in self.data[f"{figure}-data"]["data"]}


STUDY = ["timeline", "best", "curves", "hours", "ended", "parallel", "folds", "pace"]


def page_of(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page


def test_a_page_asks_no_network_for_anything_and_runs_its_own_scripts_alone(tmp_path: Path) -> None:
    page = page_of(make_study(tmp_path / "run", 30))
    links = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(str(link).startswith(("#", "data:,")) for link in links)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy)
    assert len(page.scripts) == 2
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in str(policy)
    assert "unsafe-inline" not in str(policy).split("script-src")[1].split(";")[0]


def test_a_search_is_shown_as_it_was(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 40)
    page = page_of(run)
    assert page.figures == STUDY
    study = optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(_backend(run)))
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert f"{study.best_value:.4f}" in page.said
    assert page.traces("best")["best so far"]["y"][-1] == pytest.approx(study.best_value, abs=1e-6)
    shown = page.traces("curves")[f"best: trial {study.best_trial.number}"]
    assert shown["x"] == list(study.best_trial.intermediate_values)
    assert shown["y"] == pytest.approx(list(study.best_trial.intermediate_values.values()), abs=1e-6)
    bars = [y for trace in page.data["timeline-data"]["data"] for y in trace["y"]]
    assert set(bars) == {trial.number for trial in study.trials}
    assert len(bars) > len(study.trials)  # folds within the bars
    went_on = {trial.user_attrs["continues"] for trial in study.trials if "continues" in trial.user_attrs}
    paused = [t for t in study.trials if t.state == TrialState.PRUNED and t.number not in went_on]
    at = [trial.last_step for trial in paused]
    ended = page.traces("ended")[f"paused ({len(paused)})"]
    assert dict(zip(ended["x"], ended["y"], strict=True)) == {step: at.count(step) for step in set(at)}
    missing = sum((15 - t.last_step) * _seconds(t) / t.last_step for t in paused)
    saved = next(trace for trace in page.data["hours-data"]["data"] if trace["y"] == ["saved"])
    assert saved["x"][0] == pytest.approx(missing / 3600, rel=1e-4)
    folds = page.data["folds-data"]["data"]
    assert len(folds) == 6
    assert len(folds[0]["y"]) == len(complete)


def _backend(run: Path) -> Any:
    return optuna.storages.journal.JournalFileBackend(str(run / "journal.log"))


def _seconds(trial: Any) -> float:
    return sum(report[2] + report[3] for fold in trial.user_attrs["curve"] for report in fold)


def test_a_large_search_is_drawn_with_few_elements(tmp_path: Path) -> None:
    page = page_of(make_study(tmp_path / "run", 400))
    assert page.figures == [*STUDY[:5], "importance", *STUDY[5:]]
    assert all(len(page.data[f"{name}-data"]["data"]) <= 12 for name in page.figures)
    assert "middle 80 %" in " ".join(str(name) for name in page.traces("curves"))
    assert "Trials that were ended early are left out" in page.said
    assert len(page.text) < 5_600_000


@pytest.mark.parametrize(
    ("running", "ended", "missing"),
    [
        (True, [], ["best", "hours", "ended", "folds", "pace"]),
        (False, [TrialState.COMPLETE], ["hours", "ended"]),
        (False, [TrialState.FAIL, TrialState.FAIL], ["best", "curves", "hours", "ended", "folds", "pace"]),
        (True, [TrialState.PRUNED], ["best", "folds"]),
        (False, [], STUDY),
    ],
)
def test_a_search_that_has_little_to_show(
    tmp_path: Path, running: bool, ended: list[TrialState], missing: list[str]
) -> None:
    run = tmp_path / "run"
    study, maker = new_study(run, 5), Maker()
    params, distributions = draw(maker.rng)
    drawn = (params, distributions, *reports(params, maker.rng), 60.0)
    for state in ended:
        made = {TrialState.COMPLETE: 15, TrialState.PRUNED: 1, TrialState.FAIL: 0}[state]
        scores = {"fold_scores": [0.5] * 5} if state == TrialState.COMPLETE else {}
        maker.add(state, drawn, made, 60.0, scores)
    if running:
        more = {"datetime_start": START, "datetime_complete": None}
        maker.add(TrialState.RUNNING, drawn, 2, 60.0, {"worker": {"host": "another"}}, **more)
    study.add_trials(maker.trials)
    page = page_of(run)
    assert page.figures == [name for name in STUDY if name not in missing]
    for words in ("best", "folds"):
        assert (words in missing) == ("No trial has run to its end yet" in page.said or not maker.trials)
    text = describe_status(run)
    assert ("running, 1 at once" in text) == running
    assert ("no trial has run to its end yet" in text) == ("best" in missing and bool(maker.trials))


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
    assert page.figures == ["front", "timeline", "best", "curves", "pace"]
    front = page.traces("front")["front (2)"]
    assert list(zip(front["x"], front["y"], strict=True)) == [(20.0, 0.8), (9.0, 0.7)]
    assert "A single split: there is one score a trial" in page.said
    assert "train_seconds 20" in describe_status(run)


def test_what_a_user_named_is_shown_as_text(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    run = tmp_path / "run <b>bold</b> & co"
    study = new_study(run, 5, **{"monitor.metric": f"f1{evil}"})
    space = {"model.<i>name": optuna.distributions.CategoricalDistribution(("a", evil))}
    listed = {name: json.loads(optuna.distributions.distribution_to_json(one)) for name, one in space.items()}
    study.set_user_attr("space", listed)
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
    assert evil in page.said
    assert not any(tag in ("img", "b", "i") and "onerror" in attributes for tag, attributes in page.elements)
    assert "<img" not in page.text.replace(page.scripts[0], "")
    # plotly makes elements of what looks like HTML in a figure's words
    assert "<img" not in json.dumps(page.data)


SECRETS = {
    "trainer": {"logger": {"init_args": {"api_key": "s3cret-1", "tracking_uri": "https://me:s3cret-2@host/x"}}},
    "hub_token": "s3cret-3",
    "db": {"password": "s3cret-4", "PASSWD": "s3cret-5", "credentials": {"user": "s3cret-6"}},
    "data": {"train_file": "https://host/a.csv?size=3&X-Amz-Signature=s3cret-7&token=s3cret-8"},
    "urls": ["postgresql+psycopg://u:s3cret-9@db/optuna"],
}
OPEN = {"data": {"tokenizer": "bge", "batching": {"max_tokens": "auto"}}, "keyword": "kept", "monitor": {"patience": 3}}


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
    assert page.said.count("(hidden)") > 10
    assert "--api-key '(hidden)' '--x.token=(hidden)'" in page.said


def test_what_only_looks_like_a_secret_is_shown() -> None:
    assert without_secrets(OPEN) == OPEN
    assert without_secrets({"token": None, "use_auth": True}) == {"token": None, "use_auth": True}
    assert clean("mail me@host, see https://host/a@b?tokens=3") == "mail me@host, see https://host/a@b?tokens=3"
    command = ["lightning-bge", "fit", "--data.batching.max_tokens", "4096", "--model.dropout=0.1", "2026-02-30"]
    command += ["--x", "{a: 1, b: [x, y]}", "--y=[a, 'b']"]
    assert clean_command(command) == command


def test_a_search_that_was_finished_with_repeats(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 12)
    trials = [
        {"trial": 6, "values": [0.8, 0.7, 0.9], "mean": 0.8, "spread": 0.1},
        {"trial": 3, "values": [0.9, None, 0.6], "mean": None, "spread": None},
    ]
    repeats = {"seeds": [43, 44], "winner_before": 3, "winner": 6, "missing": 0, "trials": trials}
    count = len(optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(_backend(run))).trials)
    found = {"n_runs": count, "seed_replicates": repeats, "out_of_fold": {"f1": 0.7654}, "test": {"f1": 0.7321}}
    write_json(run / "summary.json", {**found, "threshold": 0.4321, "majority_baseline": 0.5678})
    said = page_of(run).said
    for words in ("search: finished", "0.7654", "0.7321", "0.432", "0.5678"):
        assert words in said
    assert "trial 6 0.8000 0.1000 0.8000, 0.7000, 0.9000 winner" in said
    assert "trial 3 not every seed has a value 0.9000, none, 0.6000" in said


def test_a_search_that_is_being_made_and_a_study_that_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("")
    assert describe_status(tmp_path).endswith(": just begun\nno trial has begun yet")
    assert "No trial has begun yet" in page_of(tmp_path).said
    study = optuna.create_study(study_name="mine", storage=optuna.storages.JournalStorage(_backend(tmp_path)))
    study.set_user_attr("space", {})
    study.set_user_attr("settings", {})
    with pytest.raises(StudyError, match="is not one of `lightning-bge hpo`"):
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
    assert describe_status(trained).splitlines()[:2] == [
        "training run fit: not finished: running, or cut off; the same command goes on with it",
        "epochs     2 of 2 ended",
    ]
    write_json(
        trained / "summary.json",
        {"metric": "f1", "epoch": 1, "validation": {"f1": 0.5, "loss": 0.7}, "test": {"f1": 0.4}, "threshold": 0.25},
    )
    page = page_of(trained)
    assert page.figures == ["losses", "metrics", "tokens"]
    assert page.traces("losses")["train_loss"]["y"] == [0.8, 0.6]
    assert page.traces("metrics")["val_f1"]["x"] == [1]  # the second one is not a number
    for words in ("0.5000", "0.4000", "0.250", "at most 3.0% of an epoch", "train_padding is not recorded"):
        assert words in page.said
    assert "validation f1 0.5000" in describe_status(trained)
    assert "finished" in describe_status(trained)


def test_epochs_of_a_run_that_was_started_again_are_all_there(trained: Path) -> None:
    (trained / "logs" / "version_1").mkdir()
    again = LOG.replace("1,19", "2,29").replace("0,9", "1,19").replace("0.8,", "0.7,")
    (trained / "logs" / "version_1" / "metrics.csv").write_text(again)
    (trained / "logs" / "version_10").mkdir()  # just started
    assert [(epoch["epoch"], epoch["train_loss"]) for epoch in read_epochs(trained / "logs")] == [
        (0, 0.8),
        (1, 0.7),
        (2, 0.6),
    ]


def test_a_training_run_that_has_just_begun(trained: Path) -> None:
    (trained / "logs" / "version_0" / "metrics.csv").unlink()
    page = page_of(trained)
    assert page.figures == []
    assert "No epoch has ended yet" in page.said
    assert len(page.text) < 100_000  # no plotly where there is no figure
    assert "epochs     0 of 2 ended" in describe_status(trained)


@pytest.mark.parametrize("kind", ["nothing", "file", "folder"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    words = {"nothing": "does not exist", "file": "is no folder", "folder": "holds none of them"}[kind]
    for call in (write_report, describe_status, lambda run: watch_status(run, 1.0)):
        with pytest.raises(ConfigError, match=words):
            call(path)
    for command in ("report", "status"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(path)])
        assert stopped.value.code == 2
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------------- the scorecard


def test_an_audit_is_shown_with_its_verdicts_gains_and_switches(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "audit.html", "Audit", [Section("Scorecard", audit_section(AUDIT))]))
    for words in (
        AUDIT["next"],
        "✗ claimed, but not in effect",
        "✓ fine",
        "○ off",
        "- not applicable",
        "? not known",
        "38.0% (31.0% to 44.0%), measured: bf16 autocast against fp32, 5 rounds",
        "148 ms",
        "96 of 185 GFLOP/s",
        "trainer.precision: bf16-mixed\ndata.batching.num_workers: 0",
    ):
        assert re.sub(r"\s+", " ", words) in page.said
    assert page.said.count("Next:") == 1
    assert "62%" in page.said
    assert ("i", {"style": "width:62.0%"}) in page.elements


@pytest.mark.parametrize(
    "audit", [{}, {"rows": [{}]}, {"scorecard": [{}]}, {"step": {"parts": {}}}, {"peak": None, "rows": None}]
)
def test_an_audit_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path, audit: dict[str, Any]) -> None:
    Page(write_page(tmp_path / "audit.html", "Audit", [Section("Scorecard", audit_section(audit))]))


def test_a_run_with_an_audit_shows_it_and_one_without_says_how_to_make_one(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 5)
    assert f"lightning-bge audit -c {run}/config.yaml" in page_of(run).said
    write_json(run / "audit.json", AUDIT)
    said = page_of(run).said
    assert "lightning-bge audit -c" not in said
    assert AUDIT["next"] in said


# ---------------------------------------------------------------------- the terminal


def test_the_status_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_study(tmp_path / "run", 30, running=True)
    main(["status", str(run)])
    text = capsys.readouterr().out
    assert "search run: running, 1 at once" in text
    assert "of 130 ended" in text
    assert "time left  about" in text
    assert re.search(r"trial \d+, for 7 min: fold 2 of 5, epoch 2 of 3, 4 of 15 reports, f1 0\.\d{4}", text)
    assert len(text.splitlines()) < 24
    assert max(map(len, text.splitlines())) <= 120


def test_a_search_is_watched_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_study(tmp_path / "run", 5)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            ended = optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(_backend(run)))
            write_json(run / "summary.json", {"n_runs": len(ended.trials)})

    monkeypatch.setattr(status.time, "sleep", sleep)
    main(["status", str(run), "--watch", "0.5"])
    assert waits == [0.5] * 3
    assert "search run: finished" in capsys.readouterr().out


def test_ctrl_c_ends_the_watching_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    main(["status", str(make_study(tmp_path / "run", 5)), "--watch", "0.5"])
    shown = capsys.readouterr()
    assert "search run: its trials are done; what follows is at work, or was cut off" in shown.out
    assert shown.err == ""


def test_a_pause_between_looks_is_above_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", str(make_study(tmp_path / "run", 5)), "--watch", "0"])
    assert "--watch: expected more than 0 seconds, got 0" in capsys.readouterr().err


def test_the_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_study(tmp_path / "run", 5)
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_mode & 0o077 == 0  # for its owner alone


# ---------------------------------------------------------------------- how it looks


def test_no_colour_alone_tells_outcomes_or_series_apart() -> None:
    for looks in (list(OUTCOMES.values()), list(SERIES)):
        assert len({look.symbol for look in looks}) == len(looks)
        assert len({(look.pattern, look.color) for look in looks}) == len(looks)
        assert all(look.color in DARK for look in looks)
    assert set(ORDER) == set(MEANS) == {*OUTCOMES, "waiting"}


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_marks_stand_out_from_the_paper_in_both_schemes() -> None:
    """By WCAG 2.1: 3 for graphics."""
    for look in (*OUTCOMES.values(), *SERIES):
        for color, paper in ((look.color, "#ffffff"), (DARK[look.color], DARK["#ffffff"])):
            bright, dim = sorted((_luminance(color), _luminance(paper)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 3


@pytest.mark.parametrize(("last", "step"), [(5, 1), (12, 1), (15, 2), (60, 5), (100, 10), (2000, 200)])
def test_ticks_of_counts_are_whole(last: int, step: int) -> None:
    assert counted(1, last)["dtick"] == step


@pytest.mark.parametrize(
    ("time", "words"),
    [(timedelta(seconds=32), "32 s"), (timedelta(minutes=12), "12 min"), (timedelta(hours=3.44), "3.4 h")],
)
def test_times_are_said_in_the_unit_that_suits_them(time: timedelta, words: str) -> None:
    assert duration(time.total_seconds() / 3600) == words
