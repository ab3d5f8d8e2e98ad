"""Without a resample the in-bag scores are the values that a study compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from safetensors.torch import save_file

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.evaluation.candidates import Candidate, CandidateScorer, Target, Validation
from lightning_bge.hpo.evaluation.resampling import Resamples, ValidationRows
from lightning_bge.hpo.evaluation.study_estimate import Kept, estimate_study, selected_from
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.kept_predictions import kept_file
from lightning_bge.hpo.trial.out_of_fold import load_predictions, predictions_file
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.metrics.threshold import tuned_metrics
from lightning_bge.types import Schema
from tests.helpers.small_search import SPACE, make, write_files
from tests.helpers.study_run import run_study

PARAMS = {"lr": 3e-3, "dropout": 0.1}


def everything(count: int) -> Resamples:
    """One resample that has all rows, in the bag and out of it."""
    return Resamples(np.ones((count, 1), np.float32), np.ones((count, 1), np.float32))


@pytest.mark.parametrize("objective", ["best", "last"])
@pytest.mark.parametrize("per_epoch", [1, 2])
@pytest.mark.parametrize("metric", ["f1", "average_precision", "accuracy"])
def test_all_reports_of_a_trial(tmp_path: Path, metric: str, per_epoch: int, objective: Any) -> None:
    files, folder = write_files(tmp_path), tmp_path / "predictions"
    monitor = MonitorConfig(metric, objective, threshold="fixed")
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    train = make(files, monitor=monitor, per_epoch=per_epoch, epochs=3, predictions_dir=folder)
    config = StudyConfig(1, SPACE, pruner=PrunerConfig("none"))
    run_study(study, train, config, tmp_path / "run", enqueued=[PARAMS])
    [trial] = study.trials
    predictions, fold = load_predictions(predictions_file(files / "oof", 0))
    assert predictions.labels is not None
    rows = ValidationRows(predictions.labels.numpy(), fold.numpy())
    steps = Steps(2, 3, per_epoch)
    candidate = Kept(folder, steps).candidate(trial)
    assert candidate is not None
    target = Target("binary", metric, monitor.tuned, objective)
    scorer = CandidateScorer(target, rows, everything(40), steps, range(1, steps.total + 1))
    found = scorer.score(candidate).in_bag[:, 0]
    assert found == pytest.approx(list(trial.intermediate_values.values()), abs=1e-6)
    assert found[-1] == pytest.approx(trial.value, abs=1e-6)


def test_later_folds_are_decided_at_the_threshold_of_the_earlier_ones() -> None:
    random = np.random.default_rng(0)
    labels, fold = (random.random(300) < 0.3).astype(np.float32), np.arange(300) % 3
    rows = ValidationRows(labels, fold)
    logits = [(labels[mine] + random.normal(size=100)).astype(np.float32)[:, None] for mine in rows.of_fold]
    validations = [Validation(number + 1, one) for number, one in enumerate(logits)]
    scorer = CandidateScorer(Target("binary", "f1", tuned=True), rows, everything(300), Steps(3, 1), [1, 2, 3])
    found = scorer.score(Candidate(0, 3, lambda: validations)).in_bag[:, 0]
    parts = [
        Predictions(torch.arange(100), torch.from_numpy(one), torch.from_numpy(labels[mine]))
        for one, mine in zip(logits, rows.of_fold, strict=True)
    ]
    schema = Schema("binary", ("no", "yes"), ("text",), 8)
    values = [
        tuned_metrics(schema, part, Predictions.collect(parts[:number]) if number else None)["f1"]
        for number, part in enumerate(parts)
    ]
    # the thresholds of the scorer are positive rows' scores, those of a validation lie half way to the next one
    assert found == pytest.approx([np.mean(values[: number + 1]) for number in range(3)], abs=0.02)


def test_stages_that_are_not_reached_have_no_score() -> None:
    rows = ValidationRows(np.array([0.0, 1.0, 0.0, 1.0], np.float32), np.array([0, 0, 1, 1]))
    scorer = CandidateScorer(Target("binary", "accuracy"), rows, everything(4), Steps(2, 2), [1, 3, 4])
    logits = np.array([[-1.0], [1.0]], np.float32)
    found = scorer.score(Candidate(0, 3, lambda: [Validation(step, logits) for step in (1, 2, 3)]))
    assert found.in_bag[:, 0].tolist()[:2] == [1, 1]
    assert np.isnan(found.in_bag[2]).all()
    assert np.isnan(found.out_of_bag[2]).all()


def test_out_of_bag_rows_choose_neither_epoch_nor_threshold() -> None:
    """Changed labels of the rows that were not drawn change their score, and nothing else."""
    random = np.random.default_rng(0)
    labels, fold = (random.random(200) < 0.4).astype(np.float32), np.arange(200) % 2
    resamples = Resamples.draw(ValidationRows(labels, fold), 1, 0)
    unseen = resamples.out_of_bag[:, 0] == 1
    steps = Steps(2, 3)
    validations = [
        Validation(step, random.normal(size=100).astype(np.float32)[:, None]) for step in range(1, steps.total + 1)
    ]
    scores = []
    for changed in (labels, np.where(unseen, 1 - labels, labels)):
        rows = ValidationRows(changed, fold)
        # the candidates for a threshold are the scores of all positive rows: without tuning nothing depends on them
        scorer = CandidateScorer(Target("binary", "accuracy"), rows, resamples, steps, [steps.total])
        scores.append(scorer.score(Candidate(0, steps.total, lambda: validations)))
    assert scores[0].in_bag == scores[1].in_bag
    assert scores[0].out_of_bag == pytest.approx(1 - scores[1].out_of_bag)


@pytest.mark.parametrize(("metric", "tuned"), [("f1", True), ("accuracy", False), ("average_precision", False)])
def test_many_outputs_are_counted_on_some_resamples_at_a_time(
    monkeypatch: pytest.MonkeyPatch, metric: str, tuned: bool
) -> None:
    random = np.random.default_rng(0)
    labels = (random.random((60, 4)) < 0.4).astype(np.float32)
    rows = ValidationRows(labels, np.arange(60) % 2)
    validations = [Validation(step, random.normal(size=(30, 4)).astype(np.float32)) for step in (1, 2, 3, 4)]
    resamples, steps = Resamples.draw(rows, 25, 0), Steps(2, 2)
    scorer = CandidateScorer(Target("multilabel", metric, tuned), rows, resamples, steps, [1, 4])
    whole = scorer.score(Candidate(0, 4, lambda: validations))
    monkeypatch.setattr("lightning_bge.hpo.evaluation.candidates.MAX_CELLS", 3000)
    parts = scorer.score(Candidate(0, 4, lambda: validations))
    assert np.array_equal(whole.in_bag, parts.in_bag)
    assert np.array_equal(whole.out_of_bag, parts.out_of_bag)


def test_which_trials_were_compared() -> None:
    study = optuna.create_study(direction="maximize")
    ends = [
        (TrialState.COMPLETE, {}),
        (TrialState.PRUNED, {"pruned_at": 2}),
        (TrialState.PRUNED, {"pruned_at": 2, "nan": "nan"}),
        (TrialState.PRUNED, {"oom_where": "backward"}),
        (TrialState.FAIL, {}),
        (TrialState.COMPLETE, {"parameter_set": 1, "resumes": 1}),
    ]
    for state, known in ends:
        value = 0.5 if state == TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=known))
    assert [trial.number for trial in selected_from(study)] == [0, 5]


def test_a_trial_that_ended_within_the_first_epoch() -> None:
    rows = ValidationRows(np.array([0.0, 1.0, 0.0, 1.0], np.float32), np.array([0, 0, 1, 1]))
    steps = Steps(2, 2, per_epoch=2)
    scorer = CandidateScorer(Target("binary", "accuracy"), rows, everything(4), steps, [1, steps.total])
    found = scorer.score(Candidate(0, 1, lambda: [Validation(1, np.array([[-1.0], [1.0]], np.float32))]))
    assert found.in_bag[0, 0] == 1
    assert np.isnan(found.in_bag[1, 0])


def test_one_validation_that_counts_for_several_steps() -> None:
    rows = ValidationRows(np.array([0.0, 1.0], np.float32), np.array([0, 0]))
    scorer = CandidateScorer(Target("binary", "accuracy"), rows, everything(2), Steps(1, 2, per_epoch=3), [1, 2, 3])
    right, wrong = np.array([[-1.0], [1.0]], np.float32), np.array([[1.0], [-1.0]], np.float32)
    # two batches an epoch: the first validation has step 1, the second steps 2 and 3
    found = scorer.score(Candidate(0, 3, lambda: [Validation(1, wrong), Validation(3, right)]))
    assert found.in_bag[:, 0].tolist() == [0, 1, 1]


def test_seed_replicates_of_a_trial_that_resumed_another_belong_to_its_parameter_set(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = (random.random(200) < 0.5).astype(np.float32)
    rows, steps = ValidationRows(labels, np.arange(200) % 2), Steps(2, 1)
    study, replicates = (optuna.create_study(direction="maximize") for _ in range(2))
    for folder in ("p", "r"):
        (tmp_path / folder).mkdir()

    def add(to: optuna.Study, folder: str, number: int, quality: float, state: TrialState, **known: Any) -> None:
        content = {
            str(fold + 1): torch.from_numpy(
                (quality * (2 * labels[mine] - 1) + random.normal(size=len(mine))).astype(np.float32)[:, None]
            )
            for fold, mine in enumerate(rows.of_fold)
        }
        save_file(content, kept_file(tmp_path / folder, number))
        curve = [[[step, 0.5, 1, 1, 1, 1]] for step in (1, 2)]
        value = quality if state == TrialState.COMPLETE else None
        to.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs={"curve": curve, **known}))

    add(study, "p", 0, 0.1, TrialState.COMPLETE)
    add(study, "p", 1, 2.0, TrialState.PRUNED, pruned_at=1, paused_at=1)
    add(study, "p", 1, 2.0, TrialState.COMPLETE, parameter_set=1, resumes=1)
    for number, quality in enumerate((0.1, 2.0)):
        add(replicates, "r", number, quality, TrialState.COMPLETE)
    found = estimate_study(
        study,
        Kept(tmp_path / "p", steps),
        Target("binary", "accuracy"),
        rows,
        winner=study.trials[2],
        replicates={0: [replicates.trials[0]], 2: [replicates.trials[1]]},
        replicates_kept=Kept(tmp_path / "r", steps),
    )
    assert found["corrected"]["value"] > 0.9
    assert (found["n_parameter_sets"], found["n_left_out"]) == (2, 0)
    kept_file(tmp_path / "p", 1).unlink()
    lost = estimate_study(
        study,
        Kept(tmp_path / "p", steps),
        Target("binary", "accuracy"),
        rows,
        winner=study.trials[2],
        replicates={},
        replicates_kept=Kept(tmp_path / "r", steps),
    )
    assert lost == {"n_left_out": 1}
