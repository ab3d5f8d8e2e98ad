"""The options of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.errors import ConfigError


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"seconds": -1.0}, {"deadline": 0.0}, {"deadline": float("inf")}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: expected a number"):
        PlanConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"step_ms": 0.0}, {"start_s": float("nan")}, {"compile_gain": 1.0}],
)
def test_wrong_given_figures_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^given\.{next(iter(wrong))}: expected a number"):
        GivenFigures(**wrong)
