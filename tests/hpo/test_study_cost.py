"""A study that minimises a cost besides the score."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.hpo.finish.summary import trials_table
from lightning_bge.hpo.pruning.config import PrunerConfig
from tests.helpers.fake_study import open_fake, run_fake

SPACE = {"lr": {"low": 0.0, "high": 1.0}}
NONE = PrunerConfig(name="none")


def opened(folder: Path, cost: Any = "train_seconds", trials: int = 12) -> tuple[optuna.Study, StudyConfig]:
    config = StudyConfig(n_trials=trials, space=SPACE, pruner=NONE, cost=cost)
    folder.mkdir(exist_ok=True)
    return open_fake(folder, config), config


def values(trial: optuna.Trial) -> tuple[float, float]:
    lr = trial.suggest_float("lr", 0.0, 1.0)
    if trial.number == 1:
        trial.set_user_attr("pruned_at", 3)  # as one whose metric became NaN
        raise optuna.TrialPruned
    return lr, 10 + 100 * lr


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hpo.cost: expected one of .*, got money"):
        StudyConfig(space=SPACE, pruner=NONE, cost="money")  # type: ignore[arg-type]


def test_a_cost_and_a_pruner_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"hpo.pruner.name is hyperband. Set hpo.pruner.name to none, or hpo.cost to"):
        StudyConfig(cost="train_seconds", pruner=PrunerConfig(name="hyperband"))
    with pytest.raises(ConfigError, match="no trial can be pruned"):
        StudyConfig(cost="train_seconds")  # whichever pruner is the default


def test_each_line_has_the_best_score_and_the_size_of_the_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, config = opened(tmp_path)
    run_fake(tmp_path, config, values)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    first = study.trials[0].values
    assert lines[0].startswith(
        f"[ 1/12] trial 0 done: f1 {first[0]:.4f}, train_seconds {first[1]:.4g} | 0 pruned | "
        f"best {first[0]:.4f} (trial 0), Pareto front of 1 | "
    )
    assert lines[1].startswith("[ 2/12] trial 1 pruned at step 3 of 8: no value | 1 pruned | best ")
    assert "front of 11" in lines[-1]  # what is better costs more
    run_fake(tmp_path, config, values)
    assert len(study.trials) == 12


def test_a_study_without_a_cost_is_not_mixed_with_one_that_has_it(tmp_path: Path) -> None:
    opened(tmp_path / "without", None)
    opened(tmp_path / "without", None)
    with pytest.raises(StudyError, match=r"hpo.cost: None in the folder, train_seconds requested"):
        opened(tmp_path / "without")
    opened(tmp_path / "with")
    with pytest.raises(StudyError, match=r"hpo.cost: train_seconds in the folder, predict_seconds requested"):
        opened(tmp_path / "with", "predict_seconds")


def test_the_table_has_a_cost_where_there_is_one(tmp_path: Path) -> None:
    study, config = opened(tmp_path)
    run_fake(tmp_path, config, values)
    first, second, *_ = csv.DictReader(io.StringIO(trials_table(study)))
    assert [float(first[name]) for name in ("value", "cost")] == study.trials[0].values
    assert (second["state"], second["value"], second["cost"]) == ("PRUNED", "", "")
    plain = optuna.create_study()
    plain.add_trial(optuna.trial.create_trial(value=0.5))
    [row] = csv.DictReader(io.StringIO(trials_table(plain)))
    assert (row["value"], row["cost"]) == ("0.5", "")


def test_the_closing_lines_list_the_front() -> None:
    summary = {
        **dict.fromkeys(("n_complete", "n_pruned", "n_failed", "best_trial"), 3),
        **dict.fromkeys(("wall_seconds", "best_value", "majority_baseline", "threshold"), 0.5),
        **{"positive_label": "yes", "warnings": []},
        **{"study": "s", "task": "binary", "n_out_of_memory": 0, "seed_replicates": None, "model_dir": None},
        **{
            "metric": "f1",
            "sampler": "random",
            "estimate": None,
            "nested": None,
            "computed_with": {"first": {"torch": "2.9"}, "others": []},
            "best_params": {},
            "threshold_note": "note",
            "out_of_fold": {},
        },
        "cost": "predict_seconds",
        "front": [{"number": 3, "score": 0.5, "cost": 12.5}, {"number": 1, "score": 0.25, "cost": 2.0}],
    }
    text = describe_study(Path("runs/s"), summary)
    assert "Pareto front of f1 and predict_seconds:\n  trial 3: 0.5000, 12.5 s\n  trial 1: 0.2500, 2 s\n" in text
