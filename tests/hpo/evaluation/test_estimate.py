"""What a study may say of its winner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lightning_bge.hpo.evaluation.candidates import Candidate, Target, Validation
from lightning_bge.hpo.evaluation.estimate import Contest, Interval, estimate
from lightning_bge.hpo.evaluation.resampling import Resamples, ValidationRows
from lightning_bge.hpo.steps import Steps

STEPS = Steps(2, 1)
ACCURACY = Target("binary", "accuracy")


def rows_of(count: int = 400, group: int = 1) -> ValidationRows:
    labels = (np.random.default_rng(0).random(count) < 0.5).astype(np.float32)
    groups = np.arange(count) // group
    return ValidationRows(labels, groups % 2, groups if group > 1 else None)


def candidate(rows: ValidationRows, number: int, quality: float, seed: int | None = None) -> Candidate:
    """A parameter set that has run to its end, whose accuracy is about the normal distribution function of quality."""
    random = np.random.default_rng(number if seed is None else seed)
    made: Sequence[Validation] = [
        Validation(fold + 1, (quality * (2 * rows.labels[mine] - 1) + random.normal(size=len(mine)))[:, None])
        for fold, mine in enumerate(rows.of_fold)
    ]
    return Candidate(number, STEPS.total, lambda: made)


def contest(rows: ValidationRows, candidates: Sequence[Candidate], **more: object) -> Contest:
    given = {"target": ACCURACY, "rows": rows, "steps": STEPS, "candidates": candidates, "replicates": {}, **more}
    return Contest(**given)  # type: ignore[arg-type]


def test_the_winner_is_better_than_a_worse_one_and_a_constant_but_not_than_its_equal() -> None:
    rows = rows_of()
    configured = (candidate(rows, 91, 0.2), STEPS)
    found = estimate(contest(rows, [candidate(rows, n, 1.0) for n in range(3)], configured=configured))
    assert found.corrected is not None
    assert 0.78 < found.corrected.value < 0.9  # 0.841
    assert found.differences["configured"].value == pytest.approx(0.84 - 0.58, abs=0.1)
    assert {name: one.excludes_zero for name, one in found.differences.items()} == {
        "runner_up": False,
        "majority": True,
        "configured": True,
    }
    assert (found.n_parameter_sets, found.n_rows, found.n_groups) == (3, 400, None)


def test_a_single_parameter_set_is_scored_out_of_bag_and_has_no_second() -> None:
    rows = rows_of()
    found = estimate(contest(rows, [candidate(rows, 0, 1.0)]))
    assert found.corrected is not None
    assert "runner_up" not in found.differences


def test_the_same_call_gives_the_same_figures() -> None:
    rows = rows_of()
    made = [estimate(contest(rows, [candidate(rows, n, 0.5) for n in range(4)])).as_dict() for _ in range(2)]
    assert made[0] == made[1]


def test_an_error_that_is_minimised_has_differences_above_zero_where_the_winner_is_better() -> None:
    rows = ValidationRows(np.random.default_rng(0).normal(size=200).astype(np.float32), np.arange(200) % 2)

    def predicted(number: int, spread: float) -> Candidate:
        random = np.random.default_rng(number)
        made = [
            Validation(fold + 1, (rows.labels[mine] + spread * random.normal(size=len(mine)))[:, None])
            for fold, mine in enumerate(rows.of_fold)
        ]
        return Candidate(number, STEPS.total, lambda: made)

    candidates = [predicted(0, 0.1), predicted(1, 0.5)]
    found = estimate(contest(rows, candidates, target=Target("regression", "mse")))
    assert found.corrected is not None
    assert found.corrected.value == pytest.approx(0.01, abs=0.005)
    assert found.differences["runner_up"].excludes_zero
    assert found.differences["runner_up"].value == pytest.approx(0.24, abs=0.05)
    assert found.differences["majority"].value > 0.7


def test_the_winner_is_the_best_of_the_replicated_ones_by_the_mean_over_the_seeds() -> None:
    rows = rows_of()
    lucky, steady, other = (candidate(rows, n, quality) for n, quality in ((0, 1.4), (1, 1.0), (2, 0.2)))
    replicates = {
        0: [candidate(rows, 0, 0.3, seed) for seed in (10, 11)],
        1: [candidate(rows, 1, 1.0, seed) for seed in (20, 21)],
    }
    alone = estimate(contest(rows, [lucky, steady, other]))
    found = estimate(contest(rows, [lucky, steady, other], replicates=replicates))
    assert alone.corrected is not None
    assert found.corrected is not None
    assert alone.corrected.value == pytest.approx(0.92, abs=0.03)
    assert found.corrected.value == pytest.approx(0.84, abs=0.03)


def test_the_interval_has_the_variance_of_the_seed() -> None:
    rows = rows_of(2000)
    widths = []
    for qualities in ((1.0, 1.0, 1.0), (0.7, 1.0, 1.3)):
        first, *rest = (candidate(rows, 0, quality, seed) for seed, quality in enumerate(qualities))
        found = estimate(contest(rows, [first], replicates={0: rest}))
        assert found.corrected is not None
        widths.append(found.corrected.high - found.corrected.low)
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize("group", [1, 4])
def test_resamples_have_whole_groups_of_each_fold(group: int) -> None:
    rows = rows_of(200, group)
    found = Resamples.draw(rows, 50, 0)
    assert np.array_equal(found.in_bag + found.out_of_bag, np.ones((200, 50)))
    assert 0.55 < found.in_bag.mean() < 0.7
    for fold in rows.of_fold:
        assert found.in_bag[fold].any(axis=0).all()
    groups = np.arange(200) // group
    for number in range(50):
        assert len({(groups[row], found.in_bag[row, number]) for row in range(200)}) == 200 // group


def test_an_interval_without_a_known_value_is_none() -> None:
    assert Interval.of(np.full(5, np.nan)) is None
    found = Interval.of(np.array([1.0, np.nan, 3.0]))
    assert found is not None
    assert (found.value, found.excludes_zero) == (2.0, True)
