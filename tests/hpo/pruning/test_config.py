import binascii
import math

import numpy as np
import optuna
import pytest
from optuna.pruners import HyperbandPruner, NopPruner

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.forecast.preview import forecast
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner, rungs, startup_trials
from lightning_bge.hpo.pruning.pruners import StartupTrialsPruner
from lightning_bge.hpo.steps import Steps
from tests.helpers.curve_study import run

optuna.logging.set_verbosity(optuna.logging.WARNING)


def one(n_reports):
    """A single split."""
    return Steps(1, n_reports)


def curves(n_trials, n_reports, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.uniform(0.3, 0.9, n_trials)
    steps = np.arange(1, n_reports + 1)
    return ends[:, None] * (1 - np.exp(-steps / 3)) + rng.normal(0, 0.02, (n_trials, n_reports))


def simulate_hyperband(values, name, r, eta, n_startup):
    """Asynchronous Hyperband written from the papers, maximising, one trial after another."""
    n_reports = len(values[0])
    n_brackets = math.floor(math.log(n_reports / r, eta)) + 1
    budgets = [math.ceil(n_brackets * eta ** (n_brackets - 1 - b) / (n_brackets - b)) for b in range(n_brackets)]
    owner = [b for b, budget in enumerate(budgets) for _ in range(budget)]
    seen: dict[tuple[int, int], list[float]] = {}
    result, completed = [], 0
    for number, curve in enumerate(values):
        bracket = owner[binascii.crc32(f"{name}_{number}".encode()) % len(owner)]
        pruned = None
        for step in range(1, n_reports):
            if step not in {r * eta ** (bracket + k) for k in range(20)}:
                continue
            rung = seen.setdefault((bracket, step), [])
            rung.append(curve[step - 1])
            best = sorted(rung, reverse=True)[: max(1, len(rung) // eta)]
            if curve[step - 1] < best[-1] and completed >= n_startup:
                pruned = step
                break
        completed += pruned is None
        result.append(pruned)
    return result


@pytest.mark.parametrize(
    ("n_reports", "eta", "r"), [(12, 4, 1), (16, 4, 1), (9, 3, 1), (27, 3, 2), (10, 2, 3), (7, 7, 1)]
)
@pytest.mark.parametrize("startup", [0, 5])
def test_hyperband_prunes_as_a_plain_simulation(n_reports, eta, r, startup):
    config = PrunerConfig("hyperband", reduction_factor=eta, min_resource=r, n_startup_trials=startup)
    values = curves(40, n_reports)
    got = run(build_pruner(config, 40, one(n_reports)), values, name="fixed")
    assert got == simulate_hyperband(values, "fixed", r, eta, startup)
    assert got[:startup] == [None] * startup
    announced = {step for bracket in rungs(config, one(n_reports)) for step in bracket}
    assert {step for step in got if step is not None} <= announced
    assert min(step for step in got if step is not None) == min(announced)


def test_hyperband_behind_the_wrapper_equals_hyperband():
    values = curves(40, 12)
    bare = run(HyperbandPruner(1, 12, 4), values)
    assert run(StartupTrialsPruner(HyperbandPruner(1, 12, 4), 0), values) == bare
    assert any(bare)


@pytest.mark.parametrize("n_reports", range(2, 40))
@pytest.mark.parametrize("eta", [2, 3, 4])
def test_rungs_have_as_many_brackets_as_optuna(n_reports, eta):
    pruner = HyperbandPruner(1, n_reports, eta)
    study = optuna.create_study(pruner=pruner)
    trial = study.ask()
    trial.report(0.0, 1)
    trial.should_prune()
    assert len(rungs(PrunerConfig("hyperband", reduction_factor=eta), one(n_reports))) == pruner._n_brackets


def test_rungs_where_the_logarithm_rounds_down():
    assert math.log(243, 3) < 5  # Optuna's own formula loses a bracket here; it would have been an empty one
    assert rungs(PrunerConfig("hyperband", reduction_factor=3), one(243)) == [
        [1, 3, 9, 27, 81],
        [3, 9, 27, 81],
        [9, 27, 81],
        [27, 81],
        [81],
    ]


def test_rungs_of_each_pruner():
    assert rungs(PrunerConfig("hyperband"), one(12)) == [[1, 4], [4]]
    assert rungs(PrunerConfig("hyperband"), one(16)) == [[1, 4], [4], []]
    assert rungs(PrunerConfig("hyperband", min_resource=3, reduction_factor=2), one(10)) == [[3, 6], [6]]
    assert rungs(PrunerConfig(name="median", n_warmup_steps=2), one(6)) == [[3, 4, 5]]
    assert rungs(PrunerConfig(name="median", patience=2), one(6)) == [[4, 5]]
    assert rungs(PrunerConfig(name="none"), one(6)) == []
    assert rungs(PrunerConfig(name="wilcoxon"), Steps(5, 3)) == [[12]]
    assert rungs(PrunerConfig(name="asha", reduction_factor=3, min_resource=2), Steps(3, 3, 2)) == [[2, 6]]
    assert rungs(PrunerConfig("hyperband"), Steps(3, 4)) == [[1, 4, 8], [4, 8]]  # between folds, too
    assert rungs(PrunerConfig("hyperband", fold_confidence=None), Steps(3, 4)) == [[1, 4], [4]]


def test_the_default_warmup_is_an_epoch_of_each_fold_as_far_as_that_leaves_a_decision():
    median = PrunerConfig(name="median", fold_confidence=None)
    assert rungs(median, Steps(2, 3, 2)) == [[3, 4, 5, 6, 9, 10, 11]]
    assert rungs(median, Steps(3, 2)) == [[2, 4]]
    assert rungs(median, Steps(3, 1)) == [[1, 2]]
    assert rungs(median, Steps(1, 3)) == [[2]]
    assert rungs(median, Steps(1, 2)) == [[1]]
    assert rungs(PrunerConfig(name="median", n_warmup_steps=0), Steps(1, 3)) == [[1, 2]]


@pytest.mark.parametrize("name", ["hyperband", "median", "percentile"])
def test_exactly_the_first_n_startup_trials_are_complete(name):
    values = -np.arange(30.0)[:, None] + curves(30, 8)  # each worse than all before it
    got = run(build_pruner(PrunerConfig(name=name, n_startup_trials=7), 30, one(8)), values)
    assert got[:7] == [None] * 7
    # of Hyperband's first trials in a bracket the best goes on; here the later are all worse
    assert None not in got[7:]


def test_trap_optunas_bootstrap_count_prunes_the_first():
    values = curves(20, 8)
    theirs = run(HyperbandPruner(1, 8, 4, bootstrap_count=7), values)
    assert None not in theirs[:3]
    ours = run(build_pruner(PrunerConfig("hyperband", n_startup_trials=7), 20, one(8)), values)
    assert ours[:7] == [None] * 7


def test_rung_values_are_recorded_during_the_startup_trials():
    study = optuna.create_study(
        study_name="s", pruner=build_pruner(PrunerConfig("hyperband", n_startup_trials=5), 20, one(12))
    )
    for value in range(5):
        trial = study.ask()
        for step in range(1, 13):
            trial.report(value, step)
            assert step == 12 or not trial.should_prune()
        study.tell(trial, value)
    for trial in study.trials:
        assert "completed_rung_0" in trial.system_attrs


def test_trap_a_single_report_at_the_end_prunes_too_late_and_at_zero_never():
    pruner = StartupTrialsPruner(HyperbandPruner(1, 12, 4), 0)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    asked = {0: [], 12: []}
    for step, answers in asked.items():
        for value in range(20, 0, -1):
            trial = study.ask()
            trial.report(value, step)
            answers.append(trial.should_prune())
            study.tell(trial, value)
    assert not any(asked[0])
    assert any(asked[12])  # with nothing left to save: the reason why the last report never asks


def test_trap_with_patience_hyperband_prunes_no_trial_that_still_improves():
    values = -np.arange(30.0)[:, None] + np.arange(12.0) * 0.01  # ever worse trials that all still improve
    assert not any(run(build_pruner(PrunerConfig("hyperband", patience=1, n_startup_trials=0), 30, one(12)), values))
    assert any(run(build_pruner(PrunerConfig("hyperband", n_startup_trials=0), 30, one(12)), values))


@pytest.mark.parametrize(
    "config", [PrunerConfig(name="median", patience=2), PrunerConfig(name="percentile", n_warmup_steps=3)]
)
def test_median_and_percentile_prune_first_where_announced(config):
    values = np.concatenate([np.zeros((5, 8)), -np.arange(1.0, 9)[None]])  # the last one falls from the start
    got = run(build_pruner(config, 50, one(8)), values)
    assert got == [None] * 5 + [rungs(config, one(8))[0][0]]


def test_percentile_keeps_the_best_share():
    values = np.concatenate([np.arange(10.0)[:, None].repeat(4, 1), [[6.0] * 4], [[8.0] * 4]])
    config = PrunerConfig(name="percentile", percentile=25.0, n_startup_trials=10)
    assert run(build_pruner(config, 40, one(4)), values) == [None] * 10 + [2, None]


def test_the_default_number_of_startup_trials_is_a_tenth_up_to_30():
    assert [startup_trials(PrunerConfig("hyperband"), n) for n in (5, 40, 100, 300, 1000)] == [0, 4, 10, 30, 30]
    assert startup_trials(PrunerConfig("hyperband", n_startup_trials=0), 100) == 0


def test_none():
    assert isinstance(build_pruner(PrunerConfig(name="none"), 1, one(1)), NopPruner)


@pytest.mark.parametrize(
    ("config", "n_trials", "n_reports", "says"),
    [
        (PrunerConfig("hyperband"), 20, 1, "more epochs or folds"),
        (PrunerConfig("hyperband", min_resource=5), 20, 5, "lower hpo.pruner.min_resource"),
        (PrunerConfig("hyperband", min_resource=50), 20, 5, "lower hpo.pruner.min_resource"),
        (PrunerConfig(name="median", n_warmup_steps=4), 20, 5, "lower hpo.pruner.n_warmup_steps"),
        (PrunerConfig(name="median", patience=3), 20, 5, "pruner.patience"),
        (PrunerConfig("hyperband", n_startup_trials=20), 20, 5, "until 20 trials have run to their end"),
        (PrunerConfig("hyperband"), 0, 5, "at least 1 trial"),
        (PrunerConfig(name="wilcoxon"), 20, 5, "after n folds p is"),
        (PrunerConfig(name="asha", min_resource=5), 20, 5, "lower hpo.pruner.min_resource"),
    ],
)
def test_a_pruner_that_could_never_prune_is_refused(config, n_trials, n_reports, says):
    for call in (build_pruner, forecast):
        with pytest.raises(ConfigError, match=says):
            call(config, n_trials, one(n_reports))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"name": "sha"},
            "expected one of asha, hyperband, median, percentile, wilcoxon, none, or the path of a class .*got sha",
        ),
        ({"reduction_factor": 1}, "at least 2"),
        ({"min_resource": 0}, "at least 1"),
        ({"patience": -1}, "patience"),
        ({"n_startup_trials": -1}, "n_startup_trials"),
        ({"name": "percentile", "percentile": 101.0}, "0 to 100"),
        ({"n_warmup_steps": 2}, "not used by 'asha'"),
        ({"name": "median", "min_resource": 2}, "not used by 'median'"),
        ({"name": "none", "patience": 2}, "not used by 'none'"),
        ({"name": "asha", "n_startup_trials": 3}, "not used by 'asha'"),
        ({"paused_gb": float("nan")}, "paused_gb: expected a number"),
        ({"name": "median", "fold_confidence": 1.0}, "between 0.5 and 1"),
        ({"name": "median", "fold_confidence": 0.2}, "0.5 to 1"),
        ({"name": "wilcoxon", "p_threshold": 2.0}, "0 to 1"),
    ],
)
def test_wrong_settings(values, says):
    with pytest.raises(ConfigError, match=says):
        PrunerConfig(**values)
