"""Folds: computed once, checked, and named by a hash."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
)

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.log_once import log_once
from lightning_bge.types import Schema, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitConfig:
    """How the training file is split into rows to learn from and rows to validate on.

    Args:
        folds: number of folds; 1 is a single split (not needed where data.val_file is given).
        fold: which fold `fit` validates on, counted from 0.
        val_fraction: fraction of the rows that validate in a single split, above 0 and at most 0.5. With groups it is
            one of k equal parts, k = round(1 / val_fraction).
        stratified: every class has the same proportion in each fold, as far as groups allow; ignored for regression
            and multi-label.
        seed: seed of the shuffling.
        outer_folds: number of outer folds of a nested cross-validation, 2 or more; set by hpo.outer_folds. The folds
            above are then made of the rows outside of one of them. null: there are none.
        outer_fold: the outer fold that is left out, counted from 0; its rows are the test rows.
    """

    folds: int = 1
    fold: int = 0
    val_fraction: float = 0.2
    stratified: bool = True
    seed: int = 42
    outer_folds: int | None = None
    outer_fold: int | None = None

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ConfigError(f"data.split.folds must be at least 1, got {self.folds}")
        if not 0 <= self.fold < self.folds:
            raise ConfigError(f"data.split.fold counts from 0 and must be below folds={self.folds}, got {self.fold}")
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"data.split.val_fraction must be above 0 and at most 0.5, got {self.val_fraction}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"data.split.seed must be in 0 ... 2**32 - 1, got {self.seed}")
        if (self.outer_folds is None) != (self.outer_fold is None):
            raise ConfigError(
                "data.split.outer_folds and data.split.outer_fold must be set together or both be null, got "
                f"{self.outer_folds} and {self.outer_fold}. For a nested cross-validation set hpo.outer_folds"
            )
        if self.outer_folds is not None and self.outer_folds < 2:
            raise ConfigError(f"data.split.outer_folds must be at least 2, or null, got {self.outer_folds}")
        if self.outer_fold is not None and not 0 <= self.outer_fold < (self.outer_folds or 0):
            raise ConfigError(
                f"data.split.outer_fold counts from 0 and must be below outer_folds={self.outer_folds}, got "
                f"{self.outer_fold}"
            )


def make_folds(
    labels: np.ndarray,
    task: Task,
    config: SplitConfig,
    *,
    groups: np.ndarray | None = None,
    label_names: Sequence[str] = (),
    option: str = "data.split.folds",
) -> list[np.ndarray]:
    """Validation rows of each fold.

    Args:
        labels: encoded labels of N rows, [N] or [N, L].
        task: what the labels mean.
        config: number of folds or size of the single split, and the seed.
        groups: int64 [N]; rows of a group stay on one side. None: rows are independent.
        label_names: for error messages.
        option: the one that sets the number of folds, for error messages.

    Returns:
        For each fold the sorted row numbers (int64) of its validation side.

    Raises:
        DataError: too few rows, groups or rows of a class; a fold that is empty or misses a class.
    """
    classes = labels.astype(np.int64) if task in ("binary", "multiclass") else None
    rows = _Rows(len(labels), classes, groups, label_names)
    parts = config.folds if config.folds > 1 or groups is None else max(2, round(1 / config.val_fraction))
    _check_counts(rows, max(2, parts), option if config.folds > 1 else "data.split.val_fraction")
    stratified = config.stratified and classes is not None
    if parts == 1 and classes is not None:
        _check_single_split(rows.n, len(np.unique(classes)), config.val_fraction)
    splitter = _splitter(parts, stratified, groups is not None, config)
    try:
        split = splitter.split(np.zeros(rows.n), classes if stratified else None, groups)
        folds = [np.sort(validation).astype(np.int64) for _, validation in split][: config.folds]
    except ValueError as error:
        raise DataError(f"the training rows cannot be split: {error}. Change data.split") from error
    _check_folds(rows, folds)
    if task == "multilabel":
        _warn_of_labels(labels, folds, label_names)
    return folds


def _warn_of_labels(labels: np.ndarray, folds: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Warn once of labels that no row has on one side of a fold: multi-label rows are not stratified."""
    for number, fold in enumerate(folds):
        there = {"validation": labels[fold].any(axis=0), "training": np.delete(labels, fold, axis=0).any(axis=0)}
        for side, present in there.items():
            absent = [repr(names[code]) if names else str(code) for code in np.flatnonzero(~present)[:5]]
            if absent:
                what = "scored" if side == "validation" else "learnt"
                text = f"label {', '.join(absent)} has no row on the {side} side of fold {number} and can't be {what}"
                fix = "Use fewer folds or another data.split.seed, or drop the label"
                log_once(log, logging.WARNING, f"{text}. {fix}")


def make_outer_folds(
    labels: np.ndarray,
    task: Task,
    config: SplitConfig,
    *,
    groups: np.ndarray | None = None,
    label_names: Sequence[str] = (),
) -> list[np.ndarray]:
    """Rows of each outer fold of a nested cross-validation: as `make_folds`, with `config.outer_folds` folds."""
    assert config.outer_folds is not None
    outer = replace(config, folds=config.outer_folds, fold=0)
    return make_folds(labels, task, outer, groups=groups, label_names=label_names, option="hpo.outer_folds")


def folds_hash(folds: Sequence[np.ndarray]) -> str:
    """Sha256 (hex) of the folds' row numbers."""
    digest = hashlib.sha256()
    for fold in folds:
        digest.update(len(fold).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(fold, dtype="<i8").tobytes())
    return digest.hexdigest()


def validation_hash(
    schema: Schema, folds: Sequence[np.ndarray], labels: np.ndarray | None, groups: np.ndarray | None
) -> str:
    """Sha256 (hex) of what scores are computed of: scores of different validation rows, labels or groups don't compare.

    Args:
        schema: its task, and the names that the labels stand for.
        folds: the validation rows of each fold, int64.
        labels: of all rows, as in `MicroBatch`, or None.
        groups: of all rows, int64 [N], or None.
    """
    digest = hashlib.sha256(json.dumps([schema.task, schema.labels]).encode())
    for fold in folds:
        for values in (fold, *(array[fold] for array in (labels, groups) if array is not None)):
            digest.update(f"{values.dtype} {values.shape} ".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _splitter(parts: int, stratified: bool, grouped: bool, config: SplitConfig) -> Any:
    if parts == 1:
        kind = StratifiedShuffleSplit if stratified else ShuffleSplit
        return kind(1, test_size=config.val_fraction, random_state=config.seed)
    kinds = {
        (False, False): KFold,
        (True, False): StratifiedKFold,
        (False, True): GroupKFold,
        (True, True): StratifiedGroupKFold,
    }
    return kinds[stratified, grouped](parts, shuffle=True, random_state=config.seed)


@dataclass(frozen=True)
class _Rows:
    """The rows to split: how many, their classes and groups (None: there are none), and the classes' names."""

    n: int
    classes: np.ndarray | None
    groups: np.ndarray | None
    label_names: Sequence[str]

    def name(self, code: int) -> str:
        return repr(self.label_names[code]) if self.label_names else str(code)


def _check_counts(rows: _Rows, parts: int, option: str) -> None:
    """Report what scikit-learn would answer with a warning or an obscure error."""
    unit = "rows" if rows.groups is None else "groups"
    available = rows.n if rows.groups is None else len(np.unique(rows.groups))
    if available < parts:
        raise DataError(
            f"{_count(available, unit)} cannot be split into {parts} parts: change {option}, or give more {unit}"
        )
    for code in () if rows.classes is None else np.unique(rows.classes):
        of_class = rows.classes == code
        count = int(of_class.sum()) if rows.groups is None else len(np.unique(rows.groups[of_class]))
        if count < parts:
            raise DataError(
                f"class {rows.name(code)} is in {_count(count, unit)}, too few for {parts} parts that all need it: "
                f"change {option}, or merge or drop the class"
            )


def _check_single_split(count: int, classes: int, fraction: float) -> None:
    validated = math.ceil(count * fraction)  # as scikit-learn has it
    if min(validated, count - validated) < classes:
        raise DataError(
            f"of {_count(count, 'rows')} data.split.val_fraction={fraction} validates {validated}, and both sides need "
            f"{classes} or more, one for each class: change it, or give more rows"
        )


def _count(number: int, unit: str) -> str:
    return f"{number} {unit if number != 1 else unit.removesuffix('s')}"


def _check_folds(rows: _Rows, folds: Sequence[np.ndarray]) -> None:
    every = np.arange(rows.n)
    if len(folds) > 1 and not np.array_equal(np.sort(np.concatenate(folds)), every):
        raise AssertionError("a row is missing from the folds, or is in two of them")
    fewer = "Use fewer folds" if len(folds) > 1 else "Raise data.split.val_fraction"
    remedy = f"{fewer}, another data.split.seed, or more data"
    for number, fold in enumerate(folds):
        training = np.setdiff1d(every, fold)
        if not len(fold) or not len(training):
            raise DataError(f"fold {number} would have no rows on one side. {remedy}")
        if rows.groups is not None and np.intersect1d(rows.groups[fold], rows.groups[training]).size:
            raise AssertionError(f"fold {number} has a group on both sides")
        for side, chosen in (("validation", fold), ("training", training)):
            for code in () if rows.classes is None else np.setdiff1d(rows.classes, rows.classes[chosen]):
                raise DataError(
                    f"fold {number} has no row of class {rows.name(code)} on its {side} side. {remedy}, "
                    "or merge or drop the class"
                )
