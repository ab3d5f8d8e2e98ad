"""What is announced before a study is what a real study then does."""

from __future__ import annotations

import binascii
import math
from pathlib import Path

import optuna
import pytest
from optuna.pruners import HyperbandPruner
from optuna.trial import TrialState

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.preview import describe_pruner, forecast, sample_curves
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner, startup_trials
from lightning_bge.hpo.pruning.pruners import FoldWilcoxonPruner
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trials import PAUSED_AT

optuna.logging.set_verbosity(optuna.logging.WARNING)
TRIALS = 60
SPACE = {"model.optimizer.lr": {"low": 0.0, "high": 1.0}}
ORIGINAL = PrunerConfig("hyperband", reduction_factor=4, patience=3, n_startup_trials=30)
CONFIGS = {
    "hyperband": (PrunerConfig("hyperband"), Steps(1, 12)),
    "hyperband, one bracket empty": (PrunerConfig("hyperband", fold_confidence=None), Steps(4, 4)),
    "hyperband, finer reports": (PrunerConfig("hyperband", reduction_factor=3, min_resource=2), Steps(3, 3, 2)),
    "patient hyperband": (PrunerConfig("hyperband", patience=2), Steps(3, 4)),
    "median": (PrunerConfig("median", n_warmup_steps=3), Steps(5, 2)),
    "median, between folds too": (PrunerConfig("median", n_warmup_steps=5, fold_confidence=0.9), Steps(3, 2)),
    "patient percentile": (PrunerConfig("percentile", percentile=25.0, patience=1), Steps(2, 5, 2)),
    "wilcoxon": (PrunerConfig("wilcoxon"), Steps(5, 3)),
    "asha": (PrunerConfig("asha", reduction_factor=3, min_resource=2), Steps(3, 3, 2)),
    "patient hyperband after 30 start-up trials": (ORIGINAL, Steps(5, 10)),
}
NEVER = {
    "one report at the end": (PrunerConfig("hyperband", n_startup_trials=0), Steps(1, 1), HyperbandPruner(1, 5, 4)),
    "wilcoxon on three folds": (PrunerConfig("wilcoxon"), Steps(3, 3), FoldWilcoxonPruner(3)),
    "rungs beyond the reports": (PrunerConfig("hyperband", min_resource=9), Steps(2, 4), HyperbandPruner(9, 90, 4)),
}


def run(study: optuna.Study, steps: Steps) -> None:
    """60 trials, each worse than all before it and falling: whatever can be pruned is, as early as it can be."""

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("model.optimizer.lr", 0.0, 1.0)
        for step in range(1, steps.total + 1):
            trial.report(-trial.number - 0.001 * step, step)
            if step < steps.total and trial.should_prune():
                trial.set_user_attr(PAUSED_AT, step)
                raise optuna.TrialPruned
        return -trial.number - 0.001 * steps.total

    study.optimize(objective, n_trials=TRIALS)


def bracket_of(name: str, number: int, brackets: int, eta: int) -> int:
    """Which bracket a trial is in, from Hyperband's budgets and Optuna's way to draw one."""
    budgets = [math.ceil(brackets * eta ** (brackets - 1 - b) / (brackets - b)) for b in range(brackets)]
    owners = [b for b, budget in enumerate(budgets) for _ in range(budget)]
    return owners[binascii.crc32(f"{name}_{number}".encode()) % len(owners)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_study_does_what_was_announced(name: str, tmp_path: Path) -> None:
    config, steps = CONFIGS[name]
    found = forecast(config, TRIALS, steps)
    options = StudyConfig(TRIALS, SPACE, pruner=config)
    study = open_study(study_storage(tmp_path / "study", options), options, "maximize", steps, {})
    run(study, steps)
    pruned = {one.number: one.last_step for one in study.trials if one.state is TrialState.PRUNED}
    assert pruned
    assert min(pruned.values()) == found.first
    several = len(found.brackets) > 1
    brackets = {
        number: bracket_of("study", number, len(found.brackets), config.reduction_factor) if several else 0
        for number in range(TRIALS)
    }
    for number, step in pruned.items():
        assert step == found.brackets[brackets[number]][0]
    kept = [number for number in range(TRIALS) if number not in pruned]
    for number in kept[startup_trials(config, TRIALS) :]:
        first = min(other for other in range(TRIALS) if brackets[other] == brackets[number])
        # nothing can prune it, or it is the best in its bracket, being the first
        assert not found.brackets[brackets[number]] or (several and number == first)
    assert f"can first {'pause' if config.name == 'asha' else 'prune'} at step {found.first} of {steps.total}" in (
        describe_pruner(config, TRIALS, steps)
    )


@pytest.mark.parametrize("name", NEVER)
def test_what_is_refused_would_never_have_pruned(name: str) -> None:
    config, steps, pruner = NEVER[name]
    for call in (forecast, build_pruner):
        with pytest.raises(ConfigError, match="could never prune"):
            call(config, TRIALS, steps)
    study = optuna.create_study(study_name="s", direction="maximize", pruner=pruner)
    run(study, steps)
    assert all(one.state is TrialState.COMPLETE for one in study.trials)


def test_the_forecast_is_in_proportion() -> None:
    steps = Steps(5, 6)
    few, many = (forecast(PrunerConfig("median"), n, steps) for n in (100, 2000))
    assert 0 < few.pruned <= 90
    assert many.pruned > 10 * few.pruned
    assert many.cost < few.cost < 1  # the warm-up is a smaller part
    assert forecast(PrunerConfig("none"), 100, steps).cost == 1.0
    most = forecast(PrunerConfig("median", n_startup_trials=99), 100, steps)
    assert most.pruned <= 1
    assert most.cost > 0.98


def test_simulated_curves_are_those_of_folds() -> None:
    recording = sample_curves(50, Steps(4, 3, 2))
    assert {len(trial.values) for trial in recording.trials} == {24}
    ends = [trial.value for trial in recording.trials]
    assert all(trial.values[-1] == trial.value for trial in recording.trials)
    assert max(ends) - min(ends) > 0.3
    assert sample_curves(50, Steps(4, 3, 2)) == recording
    assert sample_curves(50, Steps(4, 3, 2), seed=1) != recording


def test_what_the_user_reads() -> None:
    text = describe_pruner(PrunerConfig("hyperband", fold_confidence=None), 2000, Steps(5, 6))
    first, second, third = text.splitlines()
    assert first == ("hyperband: brackets prune at steps [[1, 4, 16], [4, 16], [16]]; can first prune at step 1 of 30")
    assert second == "nothing is pruned until 30 of 2000 trials have run to their end"
    assert third.startswith("on simulated learning curves about 1,")
    assert third.endswith("% of the full cost")
    assert "rungs at steps [1, 4, 16]" in describe_pruner(PrunerConfig("asha"), 50, Steps(3, 6))
    patient = describe_pruner(ORIGINAL, 2000, Steps(5, 10))
    assert "can first prune at step 5 of 50" in patient
    assert "with hpo.pruner.patience around hyperband a trial that still improves is never pruned" in patient
    assert "nothing is pruned until 30 of 2000 trials have run to their end" in patient
    assert describe_pruner(PrunerConfig("none"), 1, Steps(1, 1)) == "no pruning: every trial runs to its end"
