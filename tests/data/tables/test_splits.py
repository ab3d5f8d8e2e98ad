from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from lightning_bge.data.tables.splits import SplitConfig, folds_hash, make_folds
from lightning_bge.errors import ConfigError, DataError

N = 120
RANDOM = np.random.default_rng(0)
CLASSES = {
    "binary": (RANDOM.random(N) < 0.3).astype(np.float32),
    "multiclass": RANDOM.integers(0, 3, N),
    "regression": RANDOM.random(N).astype(np.float32),
    "multilabel": (RANDOM.random((N, 3)) < 0.3).astype(np.float32),
}
GROUPS = np.sort(RANDOM.integers(0, 25, N))


@pytest.mark.parametrize("task", list(CLASSES))
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_folds_hold_each_row_once_and_keep_groups(task: Any, folds: int, grouped: bool, stratified: bool) -> None:
    config = SplitConfig(folds=folds, stratified=stratified)
    groups = GROUPS if grouped else None
    result = make_folds(CLASSES[task], task, config, groups=groups)
    assert len(result) == folds
    if folds > 1:
        assert np.array_equal(np.sort(np.concatenate(result)), np.arange(N))
    else:
        assert len(result[0]) == pytest.approx(N * config.val_fraction, abs=10 if grouped else 1)
    for fold in result:
        assert fold.dtype == np.int64
        assert np.array_equal(fold, np.unique(fold))
        rest = np.setdiff1d(np.arange(N), fold)
        if grouped:
            assert not set(GROUPS[fold]) & set(GROUPS[rest])
        if stratified and task == "multiclass" and not grouped:
            parts = np.bincount(CLASSES[task][fold]) / len(fold)
            np.testing.assert_allclose(parts, np.bincount(CLASSES[task]) / N, atol=0.06)
    again = make_folds(CLASSES[task], task, config, groups=groups)
    assert folds_hash(result) == folds_hash(again)
    other = make_folds(CLASSES[task], task, SplitConfig(folds=folds, stratified=stratified, seed=7), groups=groups)
    assert folds_hash(result) != folds_hash(other)


def test_same_as_sklearn() -> None:
    labels = CLASSES["binary"]
    for reference, groups in ((StratifiedKFold, None), (StratifiedGroupKFold, GROUPS)):
        split = reference(4, shuffle=True, random_state=5).split(labels, labels, groups)
        ours = make_folds(labels, "binary", SplitConfig(folds=4, seed=5), groups=groups)
        for (_, theirs), fold in zip(split, ours, strict=True):
            np.testing.assert_array_equal(fold, theirs)


def test_the_hash_depends_on_the_borders_of_folds() -> None:
    assert folds_hash([np.array([0, 1]), np.array([2])]) != folds_hash([np.array([0]), np.array([1, 2])])


def test_too_few_rows_groups_or_classes_are_refused() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1], dtype=np.float32)
    with pytest.raises(DataError, match=r"class 'yes' is in 2 rows, too few for 3 parts.*data\.split\.folds"):
        make_folds(labels, "binary", SplitConfig(folds=3), label_names=("no", "yes"))
    with pytest.raises(DataError, match="2 groups cannot be split into 3 parts"):
        make_folds(labels, "binary", SplitConfig(folds=3), groups=np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(DataError, match=r"2 groups cannot be split into 5 parts: change data\.split\.val_fraction"):
        make_folds(labels, "binary", SplitConfig(), groups=np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(DataError, match="class 1 is in 1 group,"):
        make_folds(labels, "binary", SplitConfig(folds=2), groups=np.array([0, 1, 2, 3, 4, 4]))
    with pytest.raises(DataError, match="2 rows cannot be split into 3"):
        make_folds(labels[:2], "regression", SplitConfig(folds=3))
    with pytest.raises(DataError, match="validates 1, and both sides need 2 or more, one for each class"):
        make_folds(labels, "binary", SplitConfig(val_fraction=0.1))


def test_class_missing_from_a_fold() -> None:
    # Unstratified folds know nothing of classes: with some seeds both rare rows are on one side.
    labels = np.array([1, 1] + [0] * 18, dtype=np.float32)

    def split_with_many_seeds() -> None:
        for seed in range(20):
            make_folds(labels, "binary", SplitConfig(2, stratified=False, seed=seed), label_names=("no", "yes"))

    with pytest.raises(DataError, match=r"fold \d has no row of class 'yes' on its (training|validation) side"):
        split_with_many_seeds()


def test_no_fold_is_empty_or_lacks_a_class() -> None:
    """StratifiedGroupKFold is approximate: whatever it does, folds are whole or an error says why not."""
    refused = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(4), random.integers(1, 30, 4))
        labels = (random.random(len(groups)) < 0.4).astype(np.float32)
        try:
            folds = make_folds(labels, "binary", SplitConfig(folds=3, seed=seed), groups=groups)
        except DataError:
            refused += 1
            continue
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(groups)), fold)
            assert len(np.unique(labels[fold])) == len(np.unique(labels[rest])) == 2
    assert 0 < refused < 60


@pytest.mark.parametrize("bad", [{"folds": 0}, {"fold": 1}, {"val_fraction": 0.0}, {"val_fraction": 0.9}, {"seed": -1}])
def test_wrong_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.split.{next(iter(bad))}"):
        SplitConfig(**bad)


def test_labels_that_a_fold_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.zeros((40, 2), dtype=np.float32)
    labels[::2, 0] = 1
    labels[3, 1] = 1  # one row: in the validation side of one fold, and the training side of the other
    make_folds(labels, "multilabel", SplitConfig(folds=2), label_names=("often", "once"))
    texts = [record.message for record in caplog.records]
    assert len(texts) == 2
    assert all("label 'once' has no row on the" in text for text in texts)
    assert {"can't be learnt" in text for text in texts} == {True, False}
