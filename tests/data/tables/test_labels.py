from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from lightning_bge.data.tables.labels import encode_labels, fit_labels
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.errors import ConfigError, DataError

F = RowNames(("f",))


@pytest.mark.parametrize(
    ("raw", "task", "names"),
    [
        (["1", "0", "1"], "binary", ("0", "1")),
        ([1, 0], "binary", ("0", "1")),
        ([1.0, 0.0], "binary", ("0", "1")),
        ([True, False], "binary", ("False", "True")),
        (["entailment", "not_entailment"], "binary", ("not_entailment", "entailment")),
        (["Yes", "no"], "binary", ("no", "Yes")),
        (["1", "2"], "binary", ("1", "2")),
        ([1, "1.0", True, "true", 0, "False"], "binary", ("0", "1")),
        (["TRUE", "FALSE", "TRUE"], "binary", ("FALSE", "TRUE")),
        (["01", "1", "02"], "multiclass", ("01", "1", "02")),
        ([-1, "1.0"], "binary", ("-1", "1")),
        (["spam", "ham"], "binary", ("ham", "spam")),
        (["10", "9", "2"], "multiclass", ("2", "9", "10")),
        (["b", "a", "c", "a"], "multiclass", ("a", "b", "c")),
        (["b|a", "", "c"], "multilabel", ("a", "b", "c")),
        ([["b", "a"], [], ["c"]], "multilabel", ("a", "b", "c")),
        (["0.5", 2], "regression", ()),
    ],
)
def test_names_are_found_and_sorted(raw: list[Any], task: Any, names: tuple[str, ...]) -> None:
    assert fit_labels(raw, task, F) == names


@pytest.mark.parametrize(
    ("raw", "task", "message"),
    [
        (["a", "a"], "binary", "one class only, 'a'"),
        (["a", "a"], "multiclass", "one class only"),
        (["a", "b", "c"], "binary", "Set the task to multiclass"),
        (["a", "", "b"], "binary", r"missing in 1 of 3 rows \(data row 2"),
        (["a", None, float("nan")], "multiclass", r"missing in 2 of 3 rows \(data rows 2, 3"),
        ([["a"], ["b"]], "multiclass", "set the task to multilabel"),
        (["", ""], "multilabel", "no label at all"),
        ([None, "a"], "multilabel", "missing in 1"),
        (["1", "1.0"], "regression", "nothing to learn"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(raw: list[Any], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_labels(raw, task, F)


def test_given_names_keep_their_order() -> None:
    assert fit_labels(["a", "b"], "binary", F, ["b", "a"]) == ("b", "a")
    for names in (["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ConfigError, match="distinct names"):
            fit_labels(["a", "b"], "binary", F, names)


def test_labels_become_numbers() -> None:
    binary = encode_labels(["yes", " no ", "yes"], ("no", "yes"), "binary", F)
    np.testing.assert_array_equal(binary, np.array([1, 0, 1], dtype=np.float32), strict=True)
    classes = encode_labels([2, "1", 3.0], ("1", "2", "3"), "multiclass", F)
    np.testing.assert_array_equal(classes, np.array([1, 0, 2]), strict=True)
    score = encode_labels(["1.5", 2, -1e-3], (), "regression", F)
    np.testing.assert_array_equal(score, np.array([1.5, 2, -1e-3], dtype=np.float32), strict=True)


def test_multilabel_agrees_with_sklearn() -> None:
    lists = [["b", "a"], [], ["c"], ["a", "c"]]
    expected = MultiLabelBinarizer(classes=["a", "b", "c"]).fit_transform(lists).astype(np.float32)
    for raw in (lists, [" ; ".join(row) for row in lists]):
        got = encode_labels(raw, ("a", "b", "c"), "multilabel", F, separator=";")
        np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize(
    ("raw", "task", "message"),
    [
        (["a", "z", "z"], "binary", r"f: label 'z' \(data rows 2, 3.* not among the known labels 'a', 'b'"),
        (["a|q"], "multilabel", "label 'q'"),
        ([""], "multiclass", "missing in 1 of 1"),
        (["1", "inf"], "regression", r"data row 2 has 'inf'"),
        (["1e39"], "regression", "finite"),
        (["high"], "regression", "has 'high'"),
        ([None], "regression", "has None"),
    ],
)
def test_labels_that_are_unknown_or_missing_are_refused(raw: list[Any], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_labels(raw, ("a", "b"), task, F)


def test_names_that_are_nearly_the_same_or_seem_missing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    where = RowNames(("names.csv",))
    assert fit_labels(["Yes", "yes", "not  it", "Not it", "nan"], "multiclass", where) == (
        *("Not it", "Yes", "nan", "not  it", "yes"),
    )
    fit_labels(["a", "b"], "multiclass", where, ["a", "b", "c"])
    fit_labels(["a", "b"], "multiclass", where, ["a", "b", "c"])
    texts = "\n".join(record.message for record in caplog.records)
    assert "names.csv: the labels 'Yes' and 'yes' differ by case or blanks alone, and are learnt as 2 labels" in texts
    assert "'not  it' and 'Not it'" in texts
    assert "the label 'nan' is learnt as one" in texts
    assert texts.count("no row has the label 'c' of data.table.labels") == 1
