"""Options of a study of a module that is not ours."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.module_experiment import LoggedMetric, without_refit


@pytest.mark.parametrize(
    ("options", "direction"),
    [({}, "minimize"), ({"metric": "loss"}, "minimize"), ({"metric": "acc", "mode": "max"}, "maximize")],
)
def test_what_is_better(options: dict[str, Any], direction: str) -> None:
    monitor = LoggedMetric(**options)
    assert monitor.direction == direction
    assert monitor.name == monitor.logged == options.get("metric", "val_loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "acc"}, "monitor.mode: expected max or min for the metric acc, got null"),
        ({"mode": "best"}, "monitor.mode: expected max, min or null, got 'best'"),
        ({"objective": "first"}, "monitor.objective: expected best or last, got 'first'"),
        ({"patience": 0}, "monitor.patience: expected 1 or more, or null, got 0"),
        ({"min_delta": float("nan")}, "monitor.min_delta: expected 0 or more, got nan"),
    ],
)
def test_wrong_options_of_the_metric(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoggedMetric(**options)


def test_what_needs_our_classes_is_refused() -> None:
    assert not without_refit(StudyConfig()).refit
    for options in ({"calibration": "temperature"}, {"ensemble": True}, {"outer_folds": 2}, {"encoder_cache_gb": 1.0}):
        [name] = options
        with pytest.raises(ConfigError, match=f"hpo.{name}: expected .* for a module of another project, got"):
            without_refit(StudyConfig(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Set it to 1, or hpo\.pruner\.name to median"):
        without_refit(StudyConfig(val_check_interval=0.5))
