from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from lightning_bge.data.tables.labels import encode_labels, fit_labels
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.data.tables.rows import LabelColumns
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
        (["ja", "Nein"], "binary", ("Nein", "ja")),
        (["да", "нет"], "binary", ("нет", "да")),
        (["non", "oui"], "binary", ("non", "oui")),
        (["no", "maybe"], "binary", ("no", "maybe")),
        (["fraud", "non-fraud"], "binary", ("non-fraud", "fraud")),
        (["Ironic", "not ironic"], "binary", ("not ironic", "Ironic")),
        (["note", "apple"], "binary", ("apple", "note")),
        (["caf\u00e9", "cafe\u0301", "a"], "binary", ("a", "caf\u00e9")),
        ([0.0, -0.0, "0", 1], "binary", ("0", "1")),
        ([{"b": True}, {"a": True, "b": False}, {}], "multilabel", ("b", "a")),
        ([LabelColumns(b=0, a=0), LabelColumns(b=1, a=0)], "multilabel", ("b", "a")),
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
        (["a", ""], "multilabel", "one label only, 'a'; multilabel needs at least 2: set the task to binary"),
        ([{"a": 1}, {"a": 0}], "multilabel", "set the task to binary"),
        (
            [{"a": 1}, {"b": 0}],
            "binary",
            r"data rows 1, 2 hold an object with fields, such as \{'a': 1\}, and no label",
        ),
        (["a,b", "a", "b"], "multilabel", "between ','"),
        ([[1, 0], [0, 1]], "multilabel", "whether it applies"),
        ([None, "a"], "multilabel", "missing in 1"),
        (["1", "1.0"], "regression", "nothing to learn"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(raw: list[Any], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_labels(raw, task, F)


def test_given_names_keep_their_order() -> None:
    assert fit_labels(["a", "b"], "binary", F, ["b", "a"]) == ("b", "a")
    for names in (["a", "a"], ["a", "b", "c"], ["a"]):
        with pytest.raises(ConfigError, match="distinct names"):
            fit_labels(["a", "b"], "binary", F, names)
    with pytest.raises(ConfigError, match="distinct names"):
        fit_labels(["a", "b"], "multilabel", F, ["a"])


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
        (["b,a"], "multilabel", r"'b,a'.*it seems to hold several of them, set data\.table\.label_separator to ','"),
        ([[1, 0], [0, 1]], "multilabel", "whether it applies"),
        (["0", "1"], "binary", r"write the names for the numbers into the file \('a' for 0, 'b' for 1, "),
        ([""], "multiclass", "missing in 1 of 1"),
        (["1", "inf"], "regression", r"data row 2 has 'inf': correct or drop"),
        (
            ["0,5", "1", "0,7"],
            "regression",
            r"data rows 1, 3 have none, the first of them '0,5': write numbers with a dec",
        ),
        (["5%"], "regression", "row 1 has '5%': write numbers with a decimal point, without % and without separators"),
        (["1,234.5"], "regression", "separators of thousands"),
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


@pytest.mark.parametrize(
    ("origin", "remedy"),
    [
        ("data.table.labels", "of data.table.labels: correct the rows, or add it to data.table.labels"),
        (
            "the training file",
            "of the training file: correct the rows, or add some with this label to the training file",
        ),
        ("the model", "of the model: correct the rows, or leave them out"),
    ],
)
def test_what_to_do_about_an_unknown_label_depends_on_where_the_known_ones_come_from(origin: Any, remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        encode_labels(["z"], ("a", "b"), "multiclass", F, origin=origin)


def test_a_field_that_a_row_lacks_is_a_no() -> None:
    raw = [{"a": True}, {"b": True}, {"a": False, "b": 1}, {}]
    names = fit_labels(raw, "multilabel", F)
    assert names == ("a", "b")
    expected = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(encode_labels(raw, names, "multilabel", F), expected, strict=True)


def test_classes_that_seem_to_be_several_labels_are_named(caplog: pytest.LogCaptureFixture) -> None:
    where = RowNames(("several.csv",))
    for _ in range(2):
        assert fit_labels(["a|b", "a", "b|"], "multiclass", where) == ("a", "a|b", "b|")
    [record] = caplog.records
    assert record.message.startswith("several.csv: the label 'a|b' is learnt as one class")
    assert fit_labels(["a", "b|", "c"], "multiclass", RowNames(("other.csv",))) == ("a", "b|", "c")
    assert len(caplog.records) == 1
