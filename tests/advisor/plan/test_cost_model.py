"""The arithmetic of hours, compared with figures that were worked out by hand."""

from __future__ import annotations

import math

import pytest

from lightning_bge.advisor.plan.cost_model import (
    Balance,
    How,
    TrialCost,
    break_even,
    compile_balance,
    format_hours,
    saved,
)
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.steps import Steps
from tests.helpers.paths import DOCS

REFERENCE = {"hours": 250.0 + 788.0, "times": 30 + 1970, "compile_s": 60.0, "gain": 0.15}


@pytest.mark.parametrize(("how", "expected"), [("shorter", (33.3, 155.7, 122.4)), ("faster", (33.3, 135.4, 102.1))])
def test_the_reference_case(how: How, expected: tuple[float, ...]) -> None:
    """30 unpruned trials (250 h in all), 1,970 pruned ones (788 h), 60 s of compiling in each, steps 15 % less."""
    found = compile_balance(**REFERENCE, how=how)
    assert tuple(round(value, 1) for value in found) == expected
    page = (DOCS / "plan.md").read_text(encoding="utf-8")
    assert "overhead  2,000 x 60 s = 33.3 h" in page
    assert f"= {found.saved:.1f} h" in page
    assert f"net       {found.saved:.1f} h - 33.3 h = {found.net:.1f} h" in page


def test_compiled_once_in_a_process_the_overhead_is_a_minute() -> None:
    found = compile_balance(1038.0, 1, 60.0, 0.15, "shorter")
    assert found == pytest.approx(Balance(1 / 60, 155.7, 155.7 - 1 / 60))


@pytest.mark.parametrize(("gain", "how"), [(-0.1, "shorter"), (-0.1, "faster"), (1.0, "shorter")])
def test_an_impossible_gain_is_refused(gain: float, how: str) -> None:
    with pytest.raises(ConfigError, match="gain: expected a share"):
        saved(1.0, gain, how)


def test_break_even() -> None:
    assert break_even(60.0, 0.5, 0.15) == pytest.approx(60 / 0.075)
    assert break_even(60.0, 0.5, 0.15, "faster") == pytest.approx(60 / (0.5 - 0.5 / 1.15))
    assert break_even(60.0, 0.5, 0.0) == math.inf


COST = TrialCost(start=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, epochs=2)


def test_a_trial_is_the_sum_of_its_parts() -> None:
    assert COST.reports(Steps(2, 2)) == [134.0, 124.0, 134.0, 124.0]
    assert COST.total(Steps(2, 2)) == 1 + 2 * 10 + 4 * (100 + 20 + 4)
    # half an epoch's training, but a whole validation
    assert COST.reports(Steps(1, 2, 2)) == [82.0, 72.0, 72.0, 72.0]
    # of three epochs that others train, it trains two
    assert COST.reports(Steps(2, 3)) == [134.0, 124.0, 0.0, 134.0, 124.0, 0.0]
    # early stopping after the first epoch of the second fold
    assert COST.reports(Steps(2, 2), [True, True, True, False]) == [134.0, 124.0, 134.0, 0.0]


def test_hours_are_written_in_a_fitting_unit() -> None:
    found = [format_hours(seconds / 3600) for seconds in (41, 740, 15120, 3736800, -41)]
    assert found == ["41 s", "12.3 min", "4.20 h", "1,038 h", "-41 s"]
