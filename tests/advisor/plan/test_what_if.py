"""Changes of a study, and the command-line options that make them."""

from __future__ import annotations

import pytest

from lightning_bge.advisor.plan import predict as predict_module
from lightning_bge.advisor.plan.cost_model import HOUR, Calibration, MeasuredTrial, TrialCost
from lightning_bge.advisor.plan.predict import Scenario, StudyCosts, predict
from lightning_bge.advisor.plan.what_if import MOST_WORKERS, Changes
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps

NONE, STEPS = PrunerConfig("none"), Steps(2, 3)
# a trial of 2 folds x 3 epochs takes 68 s, and one of a single split 10 + 3 x (4.8 + 2) = 30.4 s
COST = TrialCost(0.0, 10.0, 0.0, train=3.0, validation=5.0, epochs=3)
COSTS = StudyCosts([COST], Calibration((MeasuredTrial({}, {}, COST, 1.0, 0.01, 0.0),), start=60.0, steps=3))


def changes(
    n_trials: int, pruner: PrunerConfig = NONE, steps: Steps = STEPS, workers: int = 1, has_cost: bool = False
) -> Changes:
    scenario = Scenario(n_trials, steps, pruner, workers=workers, refit=False, learns=False)
    return Changes(scenario, COSTS, 0.2, has_cost)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of constant speed."""
    monkeypatch.setattr(predict_module, "DRIFT", 0.0)


@pytest.mark.usefixtures("steady")
def test_the_flags_of_another_pruner_reset_the_options_of_the_present_one() -> None:
    tuned = changes(12, PrunerConfig("asha", reduction_factor=2, paused_gb=1.0))
    [without] = [one for one in tuned.usual() if one.change == "no pruning"]
    assert without.flags == "--hpo.pruner.name none --hpo.pruner.reduction_factor 4 --hpo.pruner.paused_gb null"


@pytest.mark.usefixtures("steady")
def test_a_single_split_is_without_a_pruner_that_could_not_prune() -> None:
    # of one epoch on one split there is a single report
    split = changes(60, PrunerConfig(), Steps(2, 1)).single_split()
    assert split is not None
    assert split.flags == "--data.split.folds 1 --hpo.pruner.name none"


def test_beside_a_cost_no_pruner_is_proposed() -> None:
    assert [one for one in changes(12).usual() if "asha" in one.flags]
    assert not [one for one in changes(12, has_cost=True).usual() if "asha" in one.flags]


@pytest.mark.usefixtures("steady")
def test_a_single_split_meets_a_deadline_that_more_workers_do_not() -> None:
    planned = changes(12, workers=MOST_WORKERS)
    assert predict(planned.scenario, COSTS).mid == 60 + 68
    [fix] = planned.meeting((60 + 1.5 * 30.4) / HOUR)
    assert fix.change == "a single split"
