"""The arithmetic of what compiling costs and saves."""

from __future__ import annotations

import math

import pytest

from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
    decide,
    format_seconds,
    probe_time_limit,
    too_short,
)
from lightning_bge.callbacks.compile.probe import (
    Measured,
)
from tests.helpers.stacks import findings

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    # dynamo asks every tensor for its gradient and hides the warning of that in a way that an error filter goes around
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # inductor of torch 2.13 imports what torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def test_too_few_steps_are_not_worth_a_try() -> None:
    assert too_short(findings(), 380) == (
        "compile off: 380 steps left x at most 0.50 of 31 ms a step = 5.89 s could be saved, "
        "compiling takes at least 4 s"
    )
    assert too_short(findings(), 390) == (
        "compile off: 390 steps left x 31 ms a step = 12.1 s; to measure it takes at least 8 s, more than 2% of that"
    )
    assert too_short(findings(), 13_000) is None  # 403 s
    assert too_short(findings(), math.inf) is None


def test_a_try_takes_a_small_share_of_the_time_left() -> None:
    config = CompileConfig(time_limit=120)
    assert probe_time_limit(findings(), 6_000, config) == pytest.approx(6_000 * 0.031 * 0.02)
    assert probe_time_limit(findings(), 10**6, config) == 120
    assert probe_time_limit(findings(), math.inf, config) == 120


MEASURED = Measured(compile_s=17.0, eager_s=0.0050, compiled_s=0.0030)


@pytest.mark.parametrize(
    ("steps", "on", "text"),
    [
        (
            190_000,
            True,
            "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of 190,000 steps left: "
            "saves 37.4 min",
        ),
        (
            4_249,
            False,
            "compile off: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 steps, "
            "needed within 2,833 of 4,249 steps left",
        ),
        (4_251, True, "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of 4,251"),
        (math.inf, True, "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of unl"),
    ],
)
def test_compiling_must_pay_by_a_margin(steps: float, on: bool, text: str) -> None:
    found, reason = decide(findings(layers=6, measured=MEASURED), steps)
    assert found is on
    assert reason.startswith(text)


def test_nothing_to_save() -> None:
    on, reason = decide(findings(measured=Measured(17.0, 0.003, 0.0031)), math.inf)
    assert not on
    assert reason == "compile off: a layer's part of a batch takes 3.1 ms compiled, 3 ms eager: nothing to save"


def test_batches_of_a_step_count() -> None:
    assert findings(layers=6, measured=MEASURED, batches=4).saved_s == pytest.approx(0.048)


def test_times_are_readable() -> None:
    seconds = (0.0121, 15, 179, 200, 7100, 90_000, math.inf)
    assert [format_seconds(s) for s in seconds] == [
        "12.1 ms",
        "15 s",
        "179 s",
        "3.33 min",
        "118 min",
        "25 h",
        "unlimited time",
    ]
