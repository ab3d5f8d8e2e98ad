from __future__ import annotations

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.ranking import best_parameter_sets, cost, cost_of, front, ranked, score_of
from lightning_bge.hpo.steps import Report


def study_of(values: list[list[float]], *directions: str) -> optuna.Study:
    study = optuna.create_study(directions=directions)
    for one in values:
        study.add_trial(create_trial(values=one))
    study.add_trial(create_trial(state=TrialState.FAIL))
    return study


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_first_is_optunas_best_trial(direction: str) -> None:
    study = study_of([[0.5], [0.75], [0.25], [0.75], [0.25]], direction)
    numbers = [trial.number for trial in ranked(study)]
    assert numbers == ([1, 3, 0, 2, 4] if direction == "maximize" else [2, 4, 0, 1, 3])
    assert numbers[0] == study.best_trial.number
    assert [score_of(trial) for trial in study.trials] == [0.5, 0.75, 0.25, 0.75, 0.25, None]
    assert {cost_of(trial) for trial in study.trials} == {None}


def test_of_equal_scores_the_cheaper_comes_first_and_the_front_is_sorted_alike() -> None:
    values = [[0.5, 3.0], [0.75, 9.0], [0.25, 1.0], [0.75, 8.0], [0.5, 4.0], [0.125, 2.0]]
    study = study_of(values, "maximize", "minimize")
    assert [trial.number for trial in ranked(study)] == [3, 1, 0, 4, 2, 5]
    assert [trial.number for trial in front(study)] == [3, 0, 2]
    assert [(score_of(t), cost_of(t)) for t in study.trials] == [*map(tuple, values), (None, None)]


def test_of_equal_parameters_one_alone_is_a_point() -> None:
    study = optuna.create_study(direction="maximize")
    lr = {"lr": FloatDistribution(0, 1)}
    for value, x in ((0.5, 0.1), (0.5, 0.1), (0.75, 0.1), (0.25, 0.2), (0.25, 0.3), (0.125, 0.4)):
        study.add_trial(create_trial(value=value, params={"lr": x}, distributions=lr))
    assert [trial.number for trial in best_parameter_sets(study, 3)] == [2, 3, 4]


def test_costs() -> None:
    def report(train: float, val: float) -> Report:
        return Report(1, 0.5, train, val, 0.0, 0.0)

    # of the first validation the larger part is compiling
    curve = [[report(5.0, 9.0), report(2.0, 1.0)], [report(2.0, 2.0)]]
    assert cost("train_seconds", curve, [100, 50]) == 9.0
    assert cost("predict_seconds", curve, [100, 50]) == pytest.approx(40.0)  # of 90, 10 and 40
