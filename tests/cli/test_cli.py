"""The program as a user calls it, on the generated sample with a very small BERT."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState
from safetensors.torch import load_file

from lightning_bge.data.sample import write_sample
from lightning_bge.hpo import run as hpo_run
from lightning_bge.hpo.seed_replicates import run_seed_replicates
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import living_workers
from lightning_bge.models.tiny_bert import build_tiny_bert
from lightning_bge.trainer import BGETrainer
from tests.helpers.paths import CONFIGS, ROOT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, posts=30, test_posts=12)
    with (folder / "train.csv").open(newline="") as file:
        texts = [text for row in csv.DictReader(file) for text in (row["text"], row["criterion"])]
    build_tiny_bert(folder / "model", texts, vocab_size=300, hidden_size=16, layers=1, max_positions=128)
    return folder


@pytest.fixture
def options(sample: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model.name_or_path", str(sample / "model"), "--run_dir", str(tmp_path / "study")),
        *("--data.train_file", str(sample / "train.csv"), "--data.cache_dir", str(tmp_path / "cache")),
        *("--data.text_columns", "[text, criterion]", "--data.group_column", "post_id"),
        *("--data.max_length", "64", "--trainer.precision", "32-true", "--trainer.max_epochs", "2"),
    ]


@pytest.fixture
def search(options: list[str]) -> list[str]:
    space = '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": true}}'
    return ["hpo", *options, "--data.split.folds", "2", "--hpo.n_trials", "3", "--hpo.space", space]


def trials(folder: Path, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "journal.log")).trials


def test_a_search_ends_with_a_model_that_the_peers_load_and_that_predicts_the_same(
    run: Run, search: list[str], sample: Path, tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    study, test_file = tmp_path / "study", str(sample / "test.csv")
    status, out, err = run(*search, "--data.test_file", test_file)
    assert status == 0, err
    assert "can first pause at step 1 of 4" in out
    assert "[3/3]" in out
    summary = json.loads((study / "summary.json").read_text())
    wanted = "study n_trials n_complete n_pruned n_failed metric best_value best_params wall_seconds model_dir"
    assert set(wanted.split()) <= set(summary)
    assert summary["study"] == "study"
    assert summary["n_complete"] + summary["n_pruned"] == summary["n_trials"] == 3
    assert summary["n_failed"] == 0
    assert summary["test"].keys() >= {"f1", "accuracy"}
    with (study / "trials.csv").open(newline="") as file:
        assert [row["number"] for row in csv.DictReader(file) if not row["resumes"]] == ["0", "1", "2"]

    found = tmp_path / "scores.csv"
    common = ("--data.text_columns", "[text, criterion]", "--data.cache_dir", str(tmp_path / "cache"))
    status, _, err = run(
        *("predict", "--model.name_or_path", summary["model_dir"], "--data.predict_file", test_file, *common),
        *("--output", str(found), "--trainer.precision", "32-true"),
    )
    assert status == 0, err
    with found.open(newline="") as file, open(test_file, newline="") as texts:
        ours, rows = list(csv.DictReader(file)), list(csv.DictReader(texts))
    peer = CrossEncoder(summary["model_dir"], device="cpu").predict([(r["text"], r["criterion"]) for r in rows])
    assert [float(row["score"]) for row in ours] == pytest.approx(peer.tolist(), abs=1e-4)
    assert {row["label"] for row in ours} <= {"0", "1"}

    # best.yaml is what `fit` takes
    status, out, err = run("fit", "-c", str(study / "best.yaml"), "--trainer.enable_progress_bar", "false")
    assert status == 0, err
    assert yaml.safe_load((study / "fit" / "config.yaml").read_text())["model"]["optimizer"]["lr"] == pytest.approx(
        summary["best_params"]["model.optimizer.lr"]
    )


def test_the_same_command_again_runs_only_what_is_missing(run: Run, search: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    search = [*search, "--hpo.pruner.name", "hyperband"]  # `asha` may resume one of the first
    assert run(*search, "--hpo.n_trials", "2")[0] == 0
    before = [(t.number, t.params, t.datetime_complete) for t in trials(study)]
    status, out, _ = run(*search, "--hpo.n_trials", "2")
    assert status == 0
    assert "trial 0" not in out.split("best")[0]  # no trial's line, and no second refit
    assert [(t.number, t.params, t.datetime_complete) for t in trials(study)] == before
    status, out, _ = run(*search, "--hpo.n_trials", "4")
    assert status == 0
    after = [(t.number, t.params, t.datetime_complete) for t in trials(study)]
    assert after[:2] == before
    assert len(after) == 4
    assert len({tuple(params.values()) for _, params, _ in after}) == 4  # a resumed sampler does not start over


def test_a_study_of_other_data_is_refused(run: Run, search: list[str], tmp_path: Path) -> None:
    assert run(*search, "--hpo.n_trials", "1", "--hpo.pruner.name", "none", "--hpo.refit", "false")[0] == 0
    status, _, err = run(*search, "--data.batch_size", "8")
    assert status == 2
    assert "data.batch_size: 32 in the folder, 8 requested" in err
    assert len(trials(tmp_path / "study")) == 1


def test_a_changed_space_goes_on_with_the_trials_that_fit_into_it(run: Run, search: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    quick = [*search, "--hpo.pruner.name", "none", "--hpo.refit", "false", "--hpo.n_trials", "2"]
    assert run(*quick)[0] == 0
    before = sorted(trials(study), key=lambda trial: trial.params["model.optimizer.lr"])
    middle = sum(trial.params["model.optimizer.lr"] for trial in before) / 2
    space = f'{{"model.optimizer.lr": {{"low": {middle}, "high": 2.0e-2, "log": true}}}}'
    status, _, err = run(*quick, "--hpo.space", space)
    assert status == 0, err
    after = trials(study, "study-space-2")
    assert [trial.state for trial in after].count(TrialState.COMPLETE) == 2
    left_out, kept = (after[trial.number] for trial in before)
    assert (left_out.state, left_out.params) == (TrialState.FAIL, {})
    assert "model.optimizer.lr" in left_out.user_attrs["not_trained"]
    assert (kept.values, kept.params) == (before[1].values, before[1].params)
    assert after[2].params["model.optimizer.lr"] >= middle
    assert sorted(trials(study), key=lambda trial: trial.params["model.optimizer.lr"]) == before  # nothing is lost
    summary = json.loads((study / "summary.json").read_text())
    assert (summary["n_complete"], summary["n_failed"]) == (2, 0)


def test_a_space_of_fewer_parameter_sets_than_trials_ends_with_them_and_says_so_first(
    run: Run, search: list[str], tmp_path: Path
) -> None:
    options = ("--hpo.space", '{"model.dropout": {"choices": [0.0, 0.1]}}', "--hpo.n_trials", "6")
    status, out, err = run(*search, *options, "--hpo.pruner.name", "none", "--hpo.refit", "false")
    assert status == 0, err
    before, after = out.split("[1/2]")
    assert "the search space has 2 parameter sets, and none is trained twice: the study ends with them" in before
    assert "[2/2]" in after
    assert sorted(trial.params["model.dropout"] for trial in trials(tmp_path / "study")) == [0.0, 0.1]


MISTAKES = {
    "train file": (("--data.train_file", "nowhere.csv"), "nowhere.csv does not exist"),
    "column": (("--data.text_columns", "[text, question]"), "its columns are 'post_id', 'text', 'criterion', 'label'"),
    "metric": (("--monitor.metric", "f7"), "a binary task has f1, accuracy"),
    "groups": (("--data.group_column", "label"), "2 groups cannot be split into 3"),
    "class": (("--model.task", "regression", "--monitor.metric", "f1"), "a regression task has spearman"),
    "name": (("--hpo.space", '{"model.optimizer.rate": {"low": 1, "high": 2}}'), "no option model.optimizer.rate"),
    "bounds": (("--hpo.space", '{"model.optimizer.lr": {"low": 0.2, "high": 0.1}}'), "swap the bounds"),
    "value": (("--hpo.space", '{"model.dropout": {"low": 0.1, "high": 1.5}}'), "dropout must be from 0 to below 1"),
    "type": (("--hpo.space", '{"data.batch_size": {"choices": ["many"]}}'), "many"),
    "empty space": (("--hpo.space", "{}"), "at least one parameter"),
    "never prunes": (("--hpo.pruner.min_resource", "50"), "could never prune"),
    "clipping": (("--trainer.gradient_clip_val", "1.0"), "set model.optimizer.max_grad_norm"),
    "cost": (("--hpo.cost", "train_seconds"), "Set hpo.pruner.name to none, or hpo.cost to null"),
    "seed_replicates": (("--hpo.seed_replicates", "-1"), "hpo.seed_replicates: expected 0 or more"),
    "folds": (("--data.split.folds", "0"), "data.split.folds"),
    "option": (("--hpo.trails", "3"), "--hpo.trails"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_one_clear_message_and_leaves_nothing(
    run: Run, search: list[str], tmp_path: Path, mistake: str
) -> None:
    args, message = MISTAKES[mistake]
    folds = () if mistake == "folds" else ("--data.split.folds", "3")
    status, out, err = run(*search, *folds, *args)
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "study" / "journal.log").exists()


def test_a_full_disk_has_a_clear_message(run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr("lightning_bge.hpo.results.write_text", full)
    status, _, err = run(*search, "--hpo.n_trials", "1", "--hpo.pruner.name", "none")
    assert status == 2
    assert "no space left on the disk" in err
    monkeypatch.undo()


def test_ctrl_c_leaves_no_trial_running_and_its_trial_is_continued(
    run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fit = BGETrainer.fit

    def interrupted(self: BGETrainer, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BGETrainer, "fit", interrupted)
    status, _, err = run(*search)
    assert status == 130
    assert "the same command continues" in err
    [first] = trials(tmp_path / "study")
    assert first.state == TrialState.FAIL
    assert first.user_attrs["interrupted"] == "KeyboardInterrupt"
    monkeypatch.setattr(BGETrainer, "fit", fit)
    status, _, err = run(*search)
    assert status == 0, err
    continued = trials(tmp_path / "study")[1]
    assert continued.params == first.params
    assert continued.user_attrs["retry_of"] == 0
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert (summary["n_failed"], summary["n_interrupted"]) == (0, 1)


def seed_replicates(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(folder / "journal.log")
    return optuna.load_study(study_name=f"{folder.name}-seed-replicates", storage=storage).trials


def test_the_best_trials_are_run_again_with_other_seeds_and_ctrl_c_loses_none(
    run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    search = [*search, "--hpo.pruner.name", "none", "--hpo.seed_replicates", "2"]
    fit, calls = BGETrainer.fit, []

    def interrupted(self: BGETrainer, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 12:  # two folds each of three trials, of two repeats, and of this one
            raise KeyboardInterrupt
        fit(self, *args, **kwargs)

    monkeypatch.setattr(BGETrainer, "fit", interrupted)
    status, out, err = run(*search)
    assert status == 130
    assert "seed replicates at the end: 2 of each of the best trials, up to 5" in out
    assert [t.state.name for t in seed_replicates(study)] == ["COMPLETE"] * 2 + ["FAIL"]
    before = [(t.number, t.value, t.datetime_complete) for t in seed_replicates(study)[:2]]
    monkeypatch.setattr(BGETrainer, "fit", fit)
    status, out, err = run(*search)
    assert status == 0, err
    assert len(trials(study)) == 3
    after = seed_replicates(study)
    assert [(t.number, t.value, t.datetime_complete) for t in after[:2]] == before
    done = [(t.user_attrs["replicate_of"], t.user_attrs["seed"]) for t in after if t.state == TrialState.COMPLETE]
    assert sorted(done) == [(of, seed) for of in range(3) for seed in (43, 44)]
    summary = json.loads((study / "summary.json").read_text())
    found = {again["trial"]: again for again in summary["seed_replicates"]["trials"]}
    for trial in trials(study):
        values = [
            trial.value,
            *(t.value for t in after if t.user_attrs["replicate_of"] == trial.number and t.value is not None),
        ]
        assert sorted(found[trial.number]["values"]) == sorted(values)
        assert len(set(values)) > 1  # other seeds, another training
        assert found[trial.number]["mean"] == pytest.approx(statistics.fmean(values))
        assert found[trial.number]["spread"] == pytest.approx(statistics.stdev(values))
    winner = max(found.values(), key=lambda again: again["mean"])["trial"]
    assert summary["seed_replicates"]["winner"] == summary["best_trial"] == winner
    assert summary["best_params"] == trials(study)[winner].params
    assert yaml.safe_load((study / "best.yaml").read_text())["seed_everything"] == 42
    assert {path.stem for path in (study / "oof").iterdir()} == {"0", "1", "2"}
    assert f"{found[winner]['mean']:.4f} +- {found[winner]['spread']:.4f}" in out
    # once more: nothing is run, nothing refitted
    written = (study / "summary.json").stat().st_mtime_ns
    assert run(*search)[0] == 0
    assert seed_replicates(study) == after
    assert (study / "summary.json").stat().st_mtime_ns == written


def test_the_winner_of_the_seed_replicates_is_what_the_study_ends_with(
    run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, chosen = tmp_path / "study", run_seed_replicates

    def changed(search: optuna.Study, *args: Any, **options: Any) -> Any:
        found = chosen(search, *args, **options)
        assert found is not None
        worst = found.trials[-1].trial
        assert worst != found.before
        return replace(found, winner=worst)

    monkeypatch.setattr(hpo_run, "run_seed_replicates", changed)
    status, out, err = run(*search, "--hpo.pruner.name", "none", "--hpo.seed_replicates", "1")
    assert status == 0, err
    summary = json.loads((study / "summary.json").read_text())
    winner = trials(study)[summary["seed_replicates"]["winner"]]
    before = summary["seed_replicates"]["winner_before"]
    assert f"the winner is trial {winner.number}, and not the study's best trial, {before}" in out
    assert (summary["best_trial"], summary["best_params"]) == (winner.number, winner.params)
    assert summary["best_value"] == winner.value
    assert summary["fold_scores"] == winner.user_attrs["fold_scores"]
    assert summary["refit_epochs"] == max(1, round(statistics.fmean(winner.user_attrs["fold_epochs"])))
    best = yaml.safe_load((study / "best.yaml").read_text())
    assert best["model"]["optimizer"]["lr"] == winner.params["model.optimizer.lr"]
    # the threshold and the out-of-fold file are of its predictions
    logits = load_file(study / "oof" / f"{winner.number}.safetensors")
    order = logits["rows"].argsort()
    with (study / "oof.csv").open(newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(logits["logits"][order].flatten().sigmoid().tolist(), abs=1e-5)


def test_a_search_with_a_cost_ends_with_the_front(run: Run, search: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    status, out, err = run(
        *search, "--hpo.cost", "predict_seconds", "--hpo.pruner.name", "none", "--hpo.seed_replicates", "1"
    )
    assert status == 0, err
    assert "predict_seconds" in out.splitlines()[3]
    assert "front of" in out
    assert "Pareto front of f1 and predict_seconds:" in out
    summary = json.loads((study / "summary.json").read_text())
    assert summary["cost"] == "predict_seconds"
    done = trials(study)
    assert [len(trial.values) for trial in done] == [2] * 3
    for one in summary["front"]:
        assert one == {
            **dict(zip(("score", "cost"), done[one["number"]].values, strict=True)),
            **{"number": one["number"], "params": done[one["number"]].params},
        }
        assert not any(
            t.values[0] >= one["score"] and t.values[1] <= one["cost"] and t.values != done[one["number"]].values
            for t in done
        )
    assert summary["seed_replicates"]["winner_before"] == summary["front"][0]["number"]
    assert summary["front"][0]["score"] == max(trial.values[0] for trial in done)
    assert Path(summary["model_dir"]).is_dir()
    with (study / "trials.csv").open(newline="") as file:
        assert [float(row["cost"]) for row in csv.DictReader(file)] == [trial.values[1] for trial in done]
    status, _, err = run(*search, "--hpo.pruner.name", "none")
    assert status == 2
    assert "hpo.cost: predict_seconds in the folder, None requested" in err


def start(args: list[str], folder: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_bge.cli", *args],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.02)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_loses_no_finished_trial_and_leaves_none_running(
    search: list[str], tmp_path: Path, kill: signal.Signals
) -> None:
    study = tmp_path / "study"
    search = [*search, "--hpo.n_trials", "5", "--trainer.max_epochs", "20", "--hpo.pruner.name", "none"]
    process = start(search)
    journal = study / "journal.log"
    wait_for(lambda: journal.exists() and journal.read_text().count('"state":1') >= 1 and running(study), process)
    process.send_signal(kill)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if kill == signal.SIGINT else -kill), out
    done = [(t.number, t.value, t.datetime_complete) for t in trials(study) if t.state == TrialState.COMPLETE]
    assert done
    again = start([*search, "--hpo.refit", "false"])
    out = again.communicate(timeout=240)[0]
    assert again.returncode == 0, out
    after = trials(study)
    states = [t.state for t in after]
    assert TrialState.RUNNING not in states
    assert TrialState.WAITING not in states
    assert states.count(TrialState.COMPLETE) == 5
    assert [(t.number, t.value, t.datetime_complete) for t in after if t.number < len(done)] == done
    points = [tuple(t.params.values()) for t in after if t.state == TrialState.COMPLETE]
    assert len(set(points)) == 5  # none is repeated
    [killed] = [t for t in after if t.state == TrialState.FAIL]
    assert ("interrupted" if kill == signal.SIGINT else "worker_lost") in killed.user_attrs
    [continued] = [t for t in after if t.user_attrs.get("retry_of") == killed.number]
    assert (continued.state, continued.params) == (TrialState.COMPLETE, killed.params)
    if kill == signal.SIGINT:  # it was saved where it was
        assert continued.user_attrs["reports_before"] == len(killed.intermediate_values)


def running(study: Path) -> set[int]:
    """The processes that train a trial."""
    if not (study / "journal.log").exists() or not open_storage(study / "journal.log").get_all_studies():
        return set()
    return {t.user_attrs["worker"]["pid"] for t in trials(study) if t.state == TrialState.RUNNING}


@pytest.fixture
def held(search: list[str], tmp_path: Path) -> list[str]:
    """A search of four trials, each of which waits for the file `go` before it trains."""
    wait = f"[{{class_path: tests.helpers.wait_for_file.WaitForFile, init_args: {{path: {tmp_path / 'go'}}}}}]"
    return [*search, "--hpo.n_trials", "4", "--hpo.pruner.name", "none", "--trainer.callbacks", wait]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_trial_that_runs_and_ends_the_process_with_its_own_status(
    held: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    process = start(held)
    wait_for(lambda: bool(running(tmp_path / "study")), process)
    process.send_signal(sent)
    (tmp_path / "go").touch()
    out = process.communicate(timeout=120)[0]
    assert process.returncode == status, out
    assert f"{sent.name}: saving what is being trained" in out
    [stopped] = trials(tmp_path / "study")
    assert (stopped.state, stopped.user_attrs["interrupted"]) == (TrialState.FAIL, sent.name)
    assert (tmp_path / "study" / "checkpoints" / "0" / "state.pt").is_file()


def test_a_second_ctrl_c_stops_at_once(held: list[str], tmp_path: Path) -> None:
    process = start(held)
    try:
        wait_for(lambda: bool(running(tmp_path / "study")), process)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert any("Ctrl-C once more stops at once" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]  # no trial was allowed to begin its training
    finally:
        stop([process])
    assert process.returncode == 130, out
    assert "the same command continues" in out
    [stopped] = trials(tmp_path / "study")
    assert (stopped.state, stopped.user_attrs["interrupted"]) == (TrialState.FAIL, "KeyboardInterrupt")


def test_several_workers_of_one_command_share_a_study(held: list[str], tmp_path: Path) -> None:
    study, process = tmp_path / "study", start([*held, "--hpo.workers", "2", "--hpo.seed_replicates", "1"])
    try:
        wait_for(lambda: len(running(study)) == 2, process)
        assert process.pid not in running(study)
        (tmp_path / "go").touch()
        out = process.communicate(timeout=240)[0]
    finally:
        stop([process])
    assert process.returncode == 0, out
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE] * 4
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials(study)}) == 2
    for words in ("2 workers; what each prints is in", "[4/4] trial", "with seed 43 done: ", "best f1", "report.html"):
        assert words in out
    assert sorted(path.name for path in (study / "workers").glob("*.log")) == ["worker-0.log", "worker-1.log"]
    assert json.loads((study / "summary.json").read_text())["n_complete"] == 4


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_workers_of_a_command_save_their_trials_and_end_when_it_ends(
    held: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    study, process = tmp_path / "study", start([*held, "--hpo.workers", "2"])
    try:
        wait_for(lambda: len(running(study)) == 2, process)
        process.send_signal(sent)
        (tmp_path / "go").touch()
        out = process.communicate(timeout=120)[0]
        assert process.returncode == status, out
        until = time.monotonic() + 120
        while living_workers(study):
            assert time.monotonic() < until, "workers are left"
            time.sleep(0.1)
    finally:
        stop([process])
    # one with a trial that had ended before the request came begins no other
    stopped = [trial for trial in trials(study) if trial.state == TrialState.FAIL]
    assert {trial.state for trial in trials(study)} <= {TrialState.FAIL, TrialState.COMPLETE}
    assert [trial.user_attrs["interrupted"] for trial in stopped] == ["SIGTERM"] * len(stopped)
    assert not (study / "summary.json").exists()


def test_two_processes_at_once_on_one_run_folder_end_with_one_summary(held: list[str], tmp_path: Path) -> None:
    study, processes = tmp_path / "study", []
    try:
        for number in (1, 2):
            processes.append(start(held))
            wait_for(lambda number=number: len(running(study)) == number, processes[-1])
        assert running(study) == {process.pid for process in processes}
        (tmp_path / "go").touch()
        outs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        stop(processes)
    assert [process.returncode for process in processes] == [0, 0], outs
    done = trials(study)
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * 4
    assert len({trial.params["model.optimizer.lr"] for trial in done}) == 4
    summary = json.loads((study / "summary.json").read_text())
    assert (summary["n_trials"], summary["n_complete"], summary["n_failed"]) == (4, 4, 0)
    assert all(f"best f1 {summary['best_value']:.4f}" in out for out in outs)
    assert len(json.loads((study / "run.json").read_text())["calls"]) == 2
    assert living_workers(study) == set()


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_worker_joins_a_study_from_another_folder_although_the_paths_in_it_are_relative(
    held: list[str], tmp_path: Path, sample: Path
) -> None:
    study, elsewhere, processes = tmp_path / "study", tmp_path / "elsewhere", []
    elsewhere.mkdir()
    for name in ("model", "train.csv"):
        (tmp_path / name).symlink_to(sample / name)
    relative = {"--run_dir": "study", "--model.name_or_path": "model", "--data.train_file": "train.csv"}
    try:
        processes.append(start([*held, *(word for option in relative.items() for word in option)], tmp_path))
        wait_for(lambda: len(running(study)) == 1, processes[0])
        processes.append(start(["worker", "../study"], elsewhere))
        wait_for(lambda: len(running(study)) == 2, processes[1])
        assert running(study) == {process.pid for process in processes}
        (tmp_path / "go").touch()
        outs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        stop(processes)
    assert [process.returncode for process in processes] == [0, 0], outs
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE] * 4
    assert (study / "summary.json").is_file()
    assert list(elsewhere.iterdir()) == []
    assert yaml.safe_load((study / "config.yaml").read_text())["model"]["name_or_path"] == "model"


def test_a_worker_needs_a_study_that_was_started(run: Run, tmp_path: Path) -> None:
    status, _, err = run("worker", str(tmp_path))
    assert status == 2
    assert "expected the run folder of a study that `lightning-bge hpo` has started" in err


def test_a_moved_run_folder_goes_on_with_its_study(
    run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fit, calls = BGETrainer.fit, []

    def interrupted(self: BGETrainer, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second fold of the second trial
            raise KeyboardInterrupt
        fit(self, *args, **kwargs)

    search = [*search, "--hpo.pruner.name", "none", "--hpo.refit", "false", "--hpo.n_trials", "2"]
    moved = tmp_path / "moved"
    monkeypatch.setattr(BGETrainer, "fit", interrupted)
    assert run(*search)[0] == 130
    monkeypatch.setattr(BGETrainer, "fit", fit)
    (tmp_path / "study").rename(moved)
    status, out, err = run(*search, "--run_dir", str(moved))
    assert status == 0, err
    assert "trial 2 (continues trial 1)" in out
    [first, stopped, continued] = trials(moved)
    assert (stopped.state, continued.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert continued.params == stopped.params
    assert continued.user_attrs["reports_before"] == 2  # its first fold is not trained once more
    assert not (tmp_path / "study").exists()
    monkeypatch.chdir(moved)
    status, out, err = run(*search, "--run_dir", ".", "--hpo.n_trials", "3")
    assert status == 0, err
    assert trials(moved)[:3] == [first, stopped, continued]
    assert len(trials(moved)) == 4
    assert json.loads((moved / "summary.json").read_text())["study"] == "study"


def test_a_killed_fit_goes_on_and_ends_with_the_same_weights(options: list[str], run: Run, tmp_path: Path) -> None:
    quiet = ("--trainer.enable_progress_bar", "false", "--model.optimizer.lr", "1e-3", "--trainer.max_epochs", "12")
    args = ["fit", *options, *quiet]
    status, _, err = run(*args, "--run_dir", str(tmp_path / "whole"))
    assert status == 0, err
    process = start([*args, "--run_dir", str(tmp_path / "killed")])
    wait_for((tmp_path / "killed" / "checkpoints" / "last.ckpt").exists, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    status, out, err = run(*args, "--run_dir", str(tmp_path / "killed"))
    assert status == 0, err
    assert "resuming from" in out
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    # a finished run is not trained again; one of other settings is refused
    status, out, _ = run(*args, "--run_dir", str(tmp_path / "killed"))
    assert "is finished" in out
    status, _, err = run(*args, "--run_dir", str(tmp_path / "killed"), "--model.optimizer.lr", "2e-3")
    assert status == 2
    assert "model.optimizer.lr: 0.001 in the folder, 0.002 requested" in err


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_parsed_and_printed(run: Run, path: Path) -> None:
    command = "hpo" if "hpo:" in path.read_text() else "fit"
    status, out, err = run(command, "-c", str(path), "--print_config")
    assert status == 0, err
    printed = yaml.safe_load(out)
    asked = yaml.safe_load(path.read_text())
    assert printed["model"]["name_or_path"] == asked["model"]["name_or_path"]


def test_the_run_folder_tells_how_to_repeat_it_and_nothing_more(
    run: Run, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run("fit", *options, "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1")[0] == 0
    folder = tmp_path / "study"
    [call] = json.loads((folder / "run.json").read_text())["calls"]
    assert call["seed"] == 42
    assert call["versions"]["torch"] == version("torch")  # without the local part of some builds
    assert len(call["data_hash"]) == 64
    assert call["command"][1] == "fit"
    assert folder.stat().st_mode & 0o077 == 0
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()
