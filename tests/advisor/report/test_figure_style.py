from __future__ import annotations

import pytest

from lightning_bge.advisor.html.theme import DARK
from lightning_bge.advisor.report.figure_style import OUTCOME_MARKS, SERIES, integer_ticks
from lightning_bge.hpo.analysis.history import OUTCOMES


def test_outcomes_and_series_differ_without_colour() -> None:
    for marks in (list(OUTCOME_MARKS.values()), list(SERIES)):
        assert len({mark.symbol for mark in marks}) == len(marks)
        assert len({mark.color for mark in marks}) == len(marks)
        assert all(mark.color in DARK for mark in marks)
    assert set(OUTCOMES) == {*OUTCOME_MARKS, "waiting"}


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_marks_stand_out_from_the_paper_in_both_schemes() -> None:
    """WCAG 2.1 asks for a contrast of 3 for graphics."""
    for mark in (*OUTCOME_MARKS.values(), *SERIES):
        for color, paper in ((mark.color, "#ffffff"), (DARK[mark.color], DARK["#ffffff"])):
            bright, dim = sorted((_luminance(color), _luminance(paper)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 3


@pytest.mark.parametrize(("last", "step"), [(5, 1), (12, 1), (15, 2), (60, 5), (100, 10), (2000, 200)])
def test_ticks_of_counts_are_whole_numbers(last: int, step: int) -> None:
    assert integer_ticks(1, last)["dtick"] == step
