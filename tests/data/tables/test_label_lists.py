from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.data.tables.label_lists import is_list, label_key, label_lists
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.data.tables.rows import LabelColumns
from lightning_bge.errors import DataError

F = RowNames(("f",))


def test_one_key_for_each_way_to_write_a_label() -> None:
    assert {label_key(value) for value in (1, 1.0, "1", "1.0", "1.", " 1 ", True, "True", "true", "TRUE")} == {"1"}
    assert {label_key(value) for value in (0, 0.0, "0", "0.00", False, "false", -0.0, "-0.0", "-0", "+0")} == {"0"}
    assert {label_key(value) for value in ("caf\u00e9", "cafe\u0301 ")} == {"caf\u00e9"}
    assert [label_key(value) for value in ("01", "1.5", "Yes", "yes", "1e0", -1.0, "-1.0", "")] == [
        *("01", "1.5", "Yes", "yes", "1e0", "-1", "-1", "")
    ]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (
            ["['a', 'b']", '["a"]', "[]", "{'b'}", "('a', 'b')", "['a',]"],
            [["a", "b"], ["a"], [], ["b"], ["a", "b"], ["a"]],
        ),
        (["a|b", "", " c "], [["a", "b"], [], ["c"]]),
        ([["a", "b"], [], ("c",)], [["a", "b"], [], ["c"]]),
        (["[1, 2]", "[2]"], [[1, 2], [2]]),
        (["[null]", "['a', None]"], [[], ["a"]]),
        ([{"x": 1, "y": "0"}, {"x": "False", "y": True}], [["x"], ["y"]]),
        ([{"x": 1, "y": None}, {"z": True}], [["x"], ["z"]]),
        ([["a", None, float("nan")]], [["a"]]),
        (["it's [a]", "b"], [["it's [a]"], ["b"]]),
    ],
)
def test_labels_of_a_row(raw: list[Any], found: list[list[Any]]) -> None:
    assert label_lists(raw, None, F) == found


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (["['a' 'b']", "['a']"], r"row 1 .*seems to be a list, but not one of Python or JSON"),
        (["[a, b]"], "seems to be a list"),
        (["array(['a', 'b'], dtype=object)"], "seems to be a list"),
        (["set()"], "seems to be a list"),
        (["a", ["b", {"value": "a"}]], r"row 2 has a list of labels with .*'value': 'a'.*, a dict\. Write the names"),
        ([[[0, 5, "a"]]], r"row 1 has a list of labels with .*\[0, 5, 'a'\].*, a list"),
        ([[["a"], ["b"]]], "Write the names of the labels alone"),
        ([None, "a"], r"missing in 1 of 2 rows \(data row 1"),
        ([LabelColumns(x="maybe")], "f: column 'x' must hold 1 or 0 .* data row 1 has 'maybe'"),
        ([LabelColumns(x=None)], "column 'x' must hold 1 or 0"),
        ([{"x": 0.7}], "the field 'x' must hold 1 or 0"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused(raw: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_lists(raw, None, F)


def test_a_separator_that_is_set_is_the_only_one() -> None:
    assert label_lists(["a,b", "['c']"], ",", F) == [["a", "b"], ["['c']"]]
    assert label_lists(["a,b", "a"], "|", F) == [["a,b"], ["a"]]


def test_lists_are_known() -> None:
    for value in (["a"], "['a']", '["a"]', {"a"}, "(1, 2)"):
        assert is_list(value)
    for value in ("a", "[a", "[PAD]", 1, None, ""):
        assert not is_list(value)
