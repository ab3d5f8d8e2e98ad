"""What a trial leaves: predictions of the best, other values with another seed, and a cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.ranking import front, ranked
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trial.out_of_fold import drop_predictions, load_predictions
from tests.helpers.small_search import make, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def kept(oof_dir: Path) -> set[int]:
    return {int(path.stem) for path in oof_dir.iterdir()}


def test_the_predictions_of_the_best_five_are_kept_and_no_others(files: Path, tmp_path: Path) -> None:
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(make(files, oof_dir=tmp_path / "oof"), n_trials=8)
    best = {trial.number for trial in ranked(study)[:5]}
    assert best <= kept(tmp_path / "oof")
    assert len(kept(tmp_path / "oof")) <= 6  # one that fell out by the last trial, of which nothing was told then
    drop_predictions(study, tmp_path / "oof")
    assert kept(tmp_path / "oof") == best
    for number in best:
        found, _ = load_predictions(tmp_path / "oof" / f"{number}.safetensors")
        assert found.rows.tolist() == list(range(40))


def test_predictions_of_a_running_trial_stay_and_those_of_a_killed_one_go(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        lr = {"lr": optuna.distributions.FloatDistribution(0, 1)}
        study.add_trial(optuna.trial.create_trial(value=value, params={"lr": value}, distributions=lr))
    killed, _running = study.ask(), study.ask()
    study.tell(killed, state=TrialState.FAIL)
    for number in range(9):  # 8: a trial that began after the others were looked up
        (tmp_path / f"{number}.safetensors").touch()
    (tmp_path / "0.draft").touch()
    drop_predictions(study, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "0.draft",
        *(f"{number}.safetensors" for number in (1, 2, 3, 4, 5, 7, 8)),
    }


def test_a_seed_changes_the_training_and_not_the_folds(files: Path, tmp_path: Path) -> None:
    seeds: tuple[dict[str, int], ...] = ({}, {"seed": 43}, {"seed": 42}, {"seed": 43})
    values, folds = [], []
    objective = make(files, oof_dir=tmp_path)
    for attributes in seeds:
        study = optuna.create_study(direction="minimize")
        study.enqueue_trial({"lr": 3e-3, "dropout": 0.1}, user_attrs=attributes)
        study.optimize(objective, n_trials=1)
        values.append(study.best_value)
        folds.append(load_predictions(tmp_path / "0.safetensors")[1].tolist())
    assert values[0] == values[2] != values[1] == values[3]
    assert folds == [folds[0]] * 4


def test_of_trials_with_the_same_parameters_one_keeps_its_predictions(files: Path, tmp_path: Path) -> None:
    study = optuna.create_study(direction="minimize")
    for lr in (3e-3, 3e-3, 1e-3, 3e-3):
        study.enqueue_trial({"lr": lr, "dropout": 0.1})
    study.optimize(make(files, oof_dir=tmp_path), n_trials=4)
    drop_predictions(study, tmp_path)
    assert kept(tmp_path) == {0, 2}


@pytest.mark.parametrize("name", ["train_seconds", "predict_seconds"])
def test_two_objectives_have_no_reports_and_sampling_goes_on_over_pruned_trials(
    files: Path, tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = Objective._fold

    def diverges(self: Objective, trial: optuna.Trial, *args: Any) -> Any:
        if trial.number == 1:
            raise optuna.TrialPruned
        return fold(self, trial, *args)

    monkeypatch.setattr(Objective, "_fold", diverges)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=2)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    study.optimize(make(files, oof_dir=tmp_path, cost=name), n_trials=5)
    assert [trial.state for trial in study.trials].count(TrialState.COMPLETE) == 4
    assert study.trials[1].values is None
    for trial in ranked(study):
        score, cost = trial.values
        assert trial.intermediate_values == {}
        assert score == pytest.approx(sum(trial.user_attrs["fold_scores"]) / 2)
        spent = [report for one in trial.user_attrs["curve"] for report in one]
        assert len(spent) == 4
        if name == "train_seconds":
            assert cost == pytest.approx(sum(report[2] for report in spent))
        else:  # 20 rows a fold
            assert min(report[3] for report in spent) * 50 <= cost <= max(report[3] for report in spent) * 50
    assert front(study)[0].number == ranked(study)[0].number
    assert {trial.number for trial in ranked(study)} == kept(tmp_path)
