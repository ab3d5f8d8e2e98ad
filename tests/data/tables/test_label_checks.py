"""Cells of several labels, and of zeros and ones, are not learnt as labels."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.data.tables.label_checks import check_label_lists, separator_of_known
from lightning_bge.data.tables.label_lists import label_lists
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.data.tables.rows import LabelColumns
from lightning_bge.errors import DataError


def check(raw: list[Any], separator: str | None = None, name: str = "f") -> None:
    where = RowNames((name,))
    check_label_lists(raw, label_lists(raw, separator, where), separator, where)


@pytest.mark.parametrize(
    ("raw", "separator"),
    [
        (["drama,romance", "drama,comedy", "action"], ","),
        (["a,b", "b"], ","),
        (["1,27", "27"], ","),
        (["health, safety", "sport"], ","),
        (["a;b", "b", ""], ";"),
        (["toxic; insult", "toxic", "insult; obscene"], ";"),
        (["a/b", "c"], "/"),
        (["a\tb", "c"], "\t"),
        (["a\nb", "c"], "\n"),
        (["a、b", "c"], "、"),
        (["python pandas", "python"], " "),
        (["a b", "b c", "a c", "c a b"], " "),
        (["a & b", "b"], "&"),
        ([["a,b"], ["c"]], ","),
        (["a|b", "a,b"], ","),
        (["x|y", "drama,romance", "drama,comedy"], ","),
        (["x|y", "a & b", "a", "b"], "&"),
        (["['a', 'b']", "b, c"], ","),
    ],
)
def test_cells_of_several_labels_are_refused(raw: list[Any], separator: str) -> None:
    with pytest.raises(DataError, match="seem to hold several labels between") as caught:
        check(raw)
    assert f"Set data.table.label_separator to {separator!r}; to '|' if each cell is one" in str(caught.value)
    check([value for value in raw if isinstance(value, str)], "|")  # as the message says
    check(raw, separator)


def test_tags_in_angle_brackets_are_refused() -> None:
    with pytest.raises(DataError, match=r"'<a><b>' seem to hold several labels\. Write a\|b"):
        check(["<a><b>", "<c>"])


@pytest.mark.parametrize(
    "raw",
    [
        ["health, safety|sport", "arts, culture", "sport"],
        ["health, safety", "arts, culture", "['a', 'b']"],
        [["drama,romance", "a"], ["drama,comedy"], ["drama"]],
        ["not spam|x", "spam"],
        ["a", "b", "c-d", "e_f"],
        ["C++", "C#", "c"],
        ["a|b", "", "c"],
        [LabelColumns({"a,b": 1, "b": 0}), LabelColumns({"a,b": 0, "b": 1})],
        [{"a b": True}, {"b": True}],
        ["10", "11"],
        [[0, 1], [1, 2]],
        [[0, 1], [1], [0]],
        [[0], [1]],
        ["0", "1"],
    ],
)
def test_labels_that_are_meant_so_are_accepted(raw: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    check(raw)
    assert not caplog.records


def test_blanks_that_may_separate_labels_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        check(["python pandas", "java", "big data"], name="blank.csv")
    [record] = caplog.records
    assert record.message.startswith(
        "blank.csv: no row has two labels: a cell such as 'python pandas' is learnt as one"
    )
    check(["python pandas", "java", "big data"], "|", name="other.csv")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("raw", "separator"),
    [
        ([[1, 0, 1], [0, 0, 1]], None),
        (["[1, 0, 0]", "[0, 0, 1]"], None),
        ([[1, 0], [0, 1]], None),
        ([[True, False], [False, True], []], None),
        (["[true, false]", "[false, true]"], None),
        ([["1.0", "0.0"], ["0.0", "1.0"]], None),
        (["1,1,0", "0,1,0"], None),
        (["1,1,0", "0,1,0"], ","),
        (["1,0", "0,1"], None),
        (["1 0 1", "0 0 1"], None),
        (["1|0|1", "0|0|1"], None),
        (["101", "001"], None),
        (["10", "01"], None),
    ],
)
def test_zeros_and_ones_for_each_label_are_refused(raw: list[Any], separator: str | None) -> None:
    with pytest.raises(DataError, match=r"zeros and ones, which say for each.*do not set data\.table\.label_separator"):
        check(raw, separator)


@pytest.mark.parametrize("raw", [[[0.9, 0.1], [0.2, 0.3]], ["[0.9, 0.1]", "[0, 1]"], ["0.9,0.1", "0.5,0.5"]])
def test_a_probability_for_each_label_is_refused(raw: list[Any]) -> None:
    with pytest.raises(DataError, match="numbers from 0 to 1, which say for each label how much it applies"):
        check(raw)


def test_a_vertical_bar_in_a_label_and_a_separator_that_no_cell_has_are_named(caplog: pytest.LogCaptureFixture) -> None:
    check([["a|b", "c"], ["c"]], name="bar.jsonl")
    check(["a", "b"], ",", name="none.csv")
    assert [record.message.partition(":")[0] for record in caplog.records] == ["bar.jsonl", "none.csv"]
    assert "the label 'a|b' contains '|', by which predicted labels are joined" in caplog.records[0].message
    assert "no cell has the separator ',' of data.table.label_separator" in caplog.records[1].message


def test_the_separator_between_known_labels() -> None:
    assert separator_of_known("a;b", ["a", "b"]) == ";"
    assert separator_of_known("a;c", ["a", "b"]) is None
    assert separator_of_known("z", ["a", "b"]) is None
