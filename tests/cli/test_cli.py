"""The program as a user calls it, on the generated sample with a very small BERT."""

from __future__ import annotations

import csv
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from safetensors.torch import load_file

from lightning_bge.hpo import run as hpo_run
from lightning_bge.hpo.finish.seed_replicates import run_seed_replicates
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.models.effective_batch import EffectiveBatchModule
from lightning_bge.trainer import BGETrainer
from tests.helpers.cli_processes import trials
from tests.helpers.paths import CONFIGS

Run = Callable[..., tuple[int, str, str]]


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


def test_a_study_of_labels_without_a_pattern_is_corrected_to_chance(
    run: Run, search: list[str], sample: Path, tmp_path: Path
) -> None:
    """Nothing can be learned, so that every model has an accuracy of one half on new rows."""
    with (sample / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = list("01" * (len(rows) // 2))
    random.Random(0).shuffle(labels)
    with (tmp_path / "random.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "label": label} for row, label in zip(rows, labels, strict=True))
    changes = {"data.train_file": str(tmp_path / "random.csv"), "monitor.metric": "accuracy", "hpo.n_trials": "10"}
    changes |= {"monitor.threshold": "fixed", "hpo.sampler.name": "random", "hpo.pruner.name": "none"}
    changes |= {
        "trainer.max_epochs": "6",
        "hpo.refit": "false",
        "hpo.space": """{
        model.optimizer.lr: {low: 0.002, high: 0.02, log: true}, data.batch_size: {choices: [4, 8]}
    }""",
    }
    status, out, err = run(*search, *(part for name, value in changes.items() for part in (f"--{name}", value)))
    assert status == 0, err
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    found = summary["estimate"]
    assert found["corrected"]["value"] < summary["best_value"] - 0.02 > 0.5
    assert found["corrected"]["low"] < 0.5 < found["corrected"]["high"]
    assert (found["n_parameter_sets"], found["n_rows"], found["n_groups"]) == (10, len(rows), 30)
    assert not found["differences"]["configured"]["excludes_zero"]
    assert f"selected   {summary['best_value']:.4f}  mean over the folds; optimistic" in out
    assert f"corrected  {found['corrected']['value']:.4f}  95 % interval" in out
    assert out.count("no more than noise") == len(found["differences"]) == 3
    assert len(list((tmp_path / "study" / "predictions").glob("*.safetensors"))) == 10


def test_predictions_beyond_the_limit_are_left_out_and_that_is_said(
    run: Run, search: list[str], tmp_path: Path
) -> None:
    changes = ("--hpo.predictions_gb", "1e-9", "--hpo.baseline", "false", "--hpo.refit", "false")
    status, out, err = run(*search, *changes)
    assert status == 0, err
    assert "no corrected score: the predictions of the complete trials are not kept (hpo.predictions_gb)" in out
    assert "left out of the correction: 3 parameter sets whose predictions are not kept" in out
    assert json.loads((tmp_path / "study" / "summary.json").read_text())["estimate"] == {"n_left_out": 3}


def test_another_configured_value_gives_another_baseline_and_the_same_model(
    run: Run, search: list[str], sample: Path, tmp_path: Path
) -> None:
    search = [*search, "--data.test_file", str(sample / "test.csv")]
    weights, summaries = tmp_path / "study" / "model" / "model.safetensors", []
    for rate, trained in (("1e-5", True), ("1e-5", False), ("0.05", True)):
        status, out, err = run(*search, "--model.optimizer.lr", rate)
        assert status == 0, err
        assert ("configured hyperparameters, without a search" in out) is trained
        summaries.append(
            json.loads((tmp_path / "study" / "summary.json").read_text()) | {"at": weights.stat().st_mtime}
        )
    first, same, other = summaries
    assert same == first
    assert other["baseline"] != first["baseline"]
    assert other["estimate"]["differences"]["configured"] != first["estimate"]["differences"]["configured"]
    assert other["estimate"]["corrected"] == first["estimate"]["corrected"]
    for name in ("test", "refit", "model_dir", "at"):  # nothing was refitted, and the test file was not scored again
        assert other[name] == first[name]


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


def test_a_study_clips_and_accumulates_as_the_trainer_says(
    run: Run, search: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    step = EffectiveBatchModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        found.append((self.max_grad_norm, batch.size))
        step(self, batch, batch_idx)

    monkeypatch.setattr(EffectiveBatchModule, "training_step", training_step)
    options = ("--trainer.gradient_clip_val", "0.5", "--trainer.accumulate_grad_batches", "3", "--data.batch_size", "4")
    average = "[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}]"
    status, out, err = run(*search, *options, "--trainer.callbacks", average, "--hpo.n_trials", "1")
    assert status == 0, err
    assert " 0 failed" in out
    assert {norm for norm, _ in found} == {0.5}
    assert max(size for _, size in found) == 12


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
    "clipping": (
        ("--trainer.gradient_clip_val", "0.5", "--model.optimizer.max_grad_norm", "2"),
        "trainer.gradient_clip_val=0.5 and model.optimizer.max_grad_norm=2.0 contradict each other",
    ),
    "searched clipping": (
        (
            *("--trainer.gradient_clip_val", "0.5"),
            *("--hpo.space", '{"model.optimizer.max_grad_norm": {"choices": [1.0, 3.0]}}'),
        ),
        "trainer.gradient_clip_val=0.5 and model.optimizer.max_grad_norm=3.0 contradict each other",
    ),
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

    monkeypatch.setattr("lightning_bge.hpo.finish.results.write_text", full)
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
    assert summary["refit"]["epochs"] == max(1, round(statistics.fmean(winner.user_attrs["fold_epochs"])))
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
    assert "predict_seconds" in next(line for line in out.splitlines() if line.startswith("[1/3]"))
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
