"""Who trains on at each stage on a resample, and who wins."""

import numpy as np
import pytest

from lightning_bge.hpo.evaluation.selection import select


def test_without_pruning_the_best_in_bag_wins() -> None:
    random = np.random.default_rng(0)
    in_bag, out_of_bag = random.normal(size=(2, 8, 1, 50))
    found = select(in_bag, out_of_bag, np.zeros(8, dtype=int), 1.0)
    order = np.argsort(-in_bag[:, 0], axis=0)
    columns = np.arange(50)
    assert np.array_equal(found.winner, out_of_bag[order[0], 0, columns])
    assert np.array_equal(found.runner_up, out_of_bag[order[1], 0, columns])


def test_a_metric_that_is_minimised_has_the_lowest_winner() -> None:
    in_bag = np.array([[[0.3]], [[0.1]], [[0.2]]])
    found = select(in_bag, in_bag + 1, np.zeros(3, dtype=int), -1.0)
    assert (found.winner[0], found.runner_up[0]) == pytest.approx((1.1, 1.2))


def test_a_single_parameter_set_has_no_second() -> None:
    found = select(np.ones((1, 1, 3)), np.ones((1, 1, 3)), np.zeros(1, dtype=int), 1.0)
    assert found.winner.tolist() == [1, 1, 1]
    assert np.isnan(found.runner_up).all()


def test_where_the_same_train_on_nothing_is_shifted() -> None:
    nan = np.nan
    in_bag = np.array([[[0.9], [0.5]], [[0.8], [0.7]], [[0.1], [nan]]])
    found = select(in_bag, in_bag * 10, np.array([1, 1, 0]), 1.0)
    assert (found.winner[0], found.runner_up[0]) == (7.0, 5.0)


def test_one_that_would_train_on_takes_over_from_one_that_would_not() -> None:
    """Between resamples the later value of the trained one moves twice as far as the earlier one."""
    nan = np.nan
    in_bag = np.array([[[0.5, 0.6], [1.0, 1.2]], [[0.7, 0.1], [nan, nan]]])
    out_of_bag = np.array([[[0.4, 0.3], [0.8, 0.6]], [[0.3, 0.5], [nan, nan]]])
    found = select(in_bag, out_of_bag, np.array([1, 0]), 1.0)
    # in the first resample the second parameter set leads by 0.2 in-bag, and is 0.1 lower out of bag
    assert found.winner == pytest.approx([0.8 - 2 * 0.1, 0.6])


def test_selected_values_of_equal_parameter_sets_are_right_although_most_were_pruned() -> None:
    """Each value is noise of its own; the study keeps a quarter by a first stage that the last one contains."""
    random = np.random.default_rng(0)
    errors = []
    for _ in range(60):
        noise = random.normal(size=(40, 2, 100)) / 10  # 100 rows in each of two folds
        drawn = random.random((100, 200)) < 0.632
        inside, outside = (
            np.stack([noise[:, 0] @ chosen / chosen.sum(0), noise.sum(1) @ chosen / chosen.sum(0) / 2], axis=1)
            for chosen in (drawn, ~drawn)
        )
        last = (np.argsort(np.argsort(-noise[:, 0].mean(-1))) < 10).astype(int)
        for values in (inside, outside):
            values[last == 0, 1] = np.nan
        errors.append(select(inside, outside, last, 1.0).winner.mean())
    kept = np.mean(errors)
    assert abs(kept) < 0.003  # the score of the selected one is 0.014 too high


def test_a_resample_on_which_nothing_has_a_value_has_no_winner() -> None:
    in_bag = np.array([[[np.nan, 0.5]], [[np.nan, 0.7]]])
    found = select(in_bag, np.array([[[0.1, 0.2]], [[0.3, 0.4]]]), np.zeros(2, dtype=int), 1.0)
    assert np.isnan(found.winner[0])
    assert (found.winner[1], found.runner_up[1]) == (0.4, 0.2)


def test_a_missing_value_on_one_resample_does_not_switch_the_shift_off() -> None:
    nan = np.nan
    in_bag = np.array([[[0.5, 0.6, nan], [1.0, 1.2, 1.1]], [[0.7, 0.1, 0.1], [nan, nan, nan]]])
    found = select(in_bag, in_bag, np.array([1, 0]), 1.0)
    assert found.winner[0] == pytest.approx(1.0 + 2 * 0.2)
