"""A data module on the rows outside of one outer fold of a nested cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig, make_folds, make_outer_folds
from lightning_bge.errors import ConfigError, DataError
from tests.helpers.small_texts import random_texts

Make = Callable[..., TextDataModule]


@pytest.fixture
def make(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> Make:
    def build(outer_fold: int | None = 0, **options: Any) -> TextDataModule:
        split = {"folds": 2, "outer_folds": None if outer_fold is None else 3, "outer_fold": outer_fold}
        default = {"tokenizer": tokenizer_dir, "train_file": str(pairs_file), "cache_dir": str(tmp_path / "cache")}
        data = TextDataModule(**{**default, "split": split, **options})
        data.setup("fit")
        return data

    return build


def rows_of(loader: Any) -> list[int]:
    return [row for batch in loader for micro in batch.micro for row in micro.rows.tolist()]


@pytest.mark.parametrize("grouped", [False, True])
def test_outer_folds_hold_each_row_once_and_keep_groups(make: Make, grouped: bool) -> None:
    column = "group" if grouped else None
    each = [make(k, group_column=column) for k in range(3)]
    assert sorted(np.concatenate([data.outer_rows for data in each])) == list(range(60))
    assert len({data.folds_hash for data in each}) == 3
    assert len({data.data_hash for data in each}) == 1
    for data in each:
        others = np.setdiff1d(np.arange(60), data.outer_rows)
        assert sorted(np.concatenate(data.folds)) == others.tolist()  # the inner folds hold the other rows once
        if grouped:  # rows 0 to 4 are a group, and so on
            sides = [data.outer_rows // 5, *(fold // 5 for fold in data.folds)]
            assert sum(len(set(side)) for side in sides) == 12
        else:  # a third of the rows has a yes
            assert [int((np.append(data.outer_rows, fold) % 3 == 0).sum()) for fold in data.folds] == pytest.approx(
                [len(np.append(data.outer_rows, fold)) / 3 for fold in data.folds], abs=1
            )


def test_nothing_of_the_outer_fold_is_trained_on_counted_or_validated_on(make: Make) -> None:
    data = make(1)
    outer = set(data.outer_rows.tolist())
    for fold in (0, 1, None):
        data.select_fold(fold)
        train = rows_of(data.train_dataloader())
        val = rows_of(data.val_dataloader())
        assert sorted(train + val) == sorted(set(range(60)) - outer)
        assert data.train_rows.tolist() == sorted(train)
        assert data.class_counts is not None
        assert data.class_counts.tolist() == [sum(r % 3 != 0 for r in train), sum(r % 3 == 0 for r in train)]
    assert data.num_train_rows == 60 - len(outer)
    assert set(rows_of(data.test_dataloader())) == outer


def test_a_class_of_one_outer_fold_alone_is_in_the_schema_of_every_one(
    make: Make, write: Callable[[str, str], Path]
) -> None:
    names = ["a|b" if row == 7 else "a" if row % 2 else "" for row in range(60)]
    texts = random_texts(60, seed=1)
    lines = [f"{a}\t{b}\t{name}" for (a, b), name in zip(texts, names, strict=True)]
    path = write("several.tsv", "\n".join(["text_a\ttext_b\tlabel", *lines]) + "\n")
    each = [make(k, train_file=str(path), task="multilabel") for k in range(3)]
    [hidden] = [data for data in each if 7 in data.outer_rows]
    assert hidden.class_counts is not None
    assert hidden.class_counts[1] == 0
    assert {data.schema for data in each} == {hidden.schema}
    assert hidden.schema is not None
    assert hidden.schema.labels == ("a", "b")


def test_outer_folds_are_those_of_the_same_split_with_as_many_folds() -> None:
    labels = (np.arange(90) % 3 == 0).astype(np.float32)
    config = SplitConfig(folds=2, seed=5, outer_folds=4, outer_fold=1)
    expected = make_folds(labels, "binary", SplitConfig(folds=4, seed=5))
    found = make_outer_folds(labels, "binary", config)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_test_rows_can_be_set_up_alone(make: Make) -> None:
    known = make(2)
    data = TextDataModule(**known.hparams)
    data.setup("test")
    assert set(rows_of(data.test_dataloader())) == set(known.outer_rows.tolist())


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"outer_folds": 3}, "must be set together or both be null, got 3 and None.*set hpo.outer_folds"),
        ({"outer_fold": 0}, "must be set together or both be null, got None and 0"),
        ({"outer_folds": 1, "outer_fold": 0}, "outer_folds must be at least 2, or null, got 1"),
        ({"outer_folds": 3, "outer_fold": 3}, "outer_fold counts from 0 and must be below outer_folds=3, got 3"),
    ],
)
def test_wrong_outer_folds_are_refused(split: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SplitConfig(**split)


@pytest.mark.parametrize("name", ["val_file", "test_file"])
def test_other_files_do_not_go_with_an_outer_fold(make: Make, pairs_file: Path, name: str) -> None:
    split = {"outer_folds": 3, "outer_fold": 0}
    with pytest.raises(ConfigError, match=rf"{name} and split.outer_fold=0 exclude each other.*Leave out {name}"):
        make(split=split, **{name: str(pairs_file)})


def test_too_few_rows_of_a_class_name_the_option(make: Make) -> None:
    with pytest.raises(DataError, match=r"class 'yes' is in 20 rows, too few for 21 parts.*change hpo.outer_folds"):
        make(split={"outer_folds": 21, "outer_fold": 0})
