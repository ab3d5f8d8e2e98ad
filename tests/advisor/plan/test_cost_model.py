"""Arithmetic, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from lightning_bge.advisor.plan.cost_model import (
    ORIGINAL,
    ORIGINAL_NET,
    ORIGINAL_PARTS,
    How,
    TrialCost,
    break_even,
    compile_balance,
    describe_original,
    hours,
    money,
    needed_gain,
    saved,
)
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.steps import Steps
from tests.helpers.paths import DOCS

REFERENCE = {"hours": 250.0 + 788.0, "times": 30 + 1970, "compile_s": 60.0, "gain": 0.15}


def test_the_reference_case_with_steps_15_percent_shorter() -> None:
    found = compile_balance(**REFERENCE, how="shorter")
    assert [round(value, 1) for value in found[:3]] == [33.3, 155.7, 122.4]
    assert found.lines == (
        "overhead 2,000 x 60 s = 33.3 h",
        "saving   1,038.0 h of training with steps 15% shorter: 15% of it = 155.7 h",
        "net      155.7 h - 33.3 h = 122.4 h",
    )


def test_the_reference_case_with_steps_15_percent_faster_is_another_one() -> None:
    found = compile_balance(**REFERENCE, how="faster")
    assert [round(value, 1) for value in found[:3]] == [33.3, 135.4, 102.1]
    assert found.lines == (
        "overhead 2,000 x 60 s = 33.3 h",
        "saving   1,038.0 h of training with steps 15% faster: 1,038.0 h / 1.15 less = 135.4 h",
        "net      135.4 h - 33.3 h = 102.1 h",
    )


def test_the_page_shows_this_arithmetic() -> None:
    page = (DOCS / "plan.md").read_text(encoding="utf-8")
    kinds: tuple[How, How] = ("shorter", "faster")
    for line in (
        *describe_original()[:3],
        *(line for how in kinds for line in compile_balance(**REFERENCE, how=how).lines),
    ):
        assert line in page


def test_compiled_once_a_process_the_overhead_is_a_minute() -> None:
    found = compile_balance(1038.0, 1, 60.0, 0.15, "shorter")
    assert found.overhead == pytest.approx(1 / 60)
    assert found.net == pytest.approx(155.7 - 1 / 60)


def test_the_original_table_and_its_two_wrong_sums() -> None:
    assert [round(after / before, 4) for _, before, after in ORIGINAL] == [0.8475, 0.9499, 0.9006]
    assert ORIGINAL[0][1] * 0.8475 * 0.9499 * 0.9006 == pytest.approx(580, abs=0.1)
    assert sum(ORIGINAL_PARTS) == 1038
    assert round(compile_balance(**REFERENCE, how="shorter").net, 1) == ORIGINAL_NET
    assert round(800 - ORIGINAL_NET) == 678
    assert describe_original() == [
        "+TF32: 800 h -> 678 h, a factor of 678 / 800 = 0.8475: 15.2% shorter, or 18.0% faster",
        "+zero_grad(set_to_none=True): 678 h -> 644 h, a factor of 644 / 678 = 0.9499: 5.0% shorter, or 5.3% faster",
        "+max-autotune: 644 h -> 580 h, a factor of 580 / 644 = 0.9006: 9.9% shorter, or 11.0% faster",
        "its trials take 250 h + 788 h = 1,038 h, not 800 h; and 800 h - 122.4 h, what compiling saves net of 1,038 h, "
        "is its second figure, 678 h",
    ]


@pytest.mark.parametrize(("gain", "how"), [(-0.1, "shorter"), (-0.1, "faster"), (1.0, "shorter")])
def test_a_gain_that_can_not_be_is_refused(gain: float, how: str) -> None:
    with pytest.raises(ConfigError, match="a gain is a share"):
        saved(1.0, gain, how)


def test_break_even() -> None:
    assert break_even(60.0, 0.5, 0.15) == pytest.approx(60 / 0.075)
    assert break_even(60.0, 0.5, 0.15, "faster") == pytest.approx(60 / (0.5 - 0.5 / 1.15))
    assert break_even(60.0, 0.5, 0.0) == math.inf
    assert needed_gain(60.0, 600.0) == 0.1
    assert needed_gain(60.0, 0.0) == math.inf


COST = TrialCost(visit=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, epochs=2)


def test_a_trial_is_the_sum_of_its_parts() -> None:
    assert COST.reports(Steps(2, 2)) == [134.0, 124.0, 134.0, 124.0]
    assert COST.total(Steps(2, 2)) == 1 + 2 * 10 + 4 * (100 + 20 + 4)
    # half an epoch's training, but a whole validation
    assert COST.reports(Steps(1, 2, 2)) == [82.0, 72.0, 72.0, 72.0]
    # of three epochs that others train, it trains two
    assert COST.reports(Steps(2, 3)) == [134.0, 124.0, 0.0, 134.0, 124.0, 0.0]
    # early stopping after the first epoch of the second fold
    assert COST.reports(Steps(2, 2), [True, True, True, False]) == [134.0, 124.0, 134.0, 0.0]


def test_hours_are_written_as_they_are_read() -> None:
    assert [hours(seconds / 3600) for seconds in (41, 740, 15120, 3736800)] == ["41 s", "12.3 min", "4.20 h", "1,038 h"]
    assert money(12.0, 2.5) == 30.0
