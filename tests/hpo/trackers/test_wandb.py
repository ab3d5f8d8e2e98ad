"""What W&B's server says of runs; the rest is in test_real_trackers.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_bge.hpo.trackers.record import StudyRecord
from lightning_bge.hpo.trackers.tracker import Known
from lightning_bge.hpo.trackers.wandb import WandbTracker


def test_only_an_ended_run_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        SimpleNamespace(id="a", state="finished", summary={"state": "paused", "n_points": 3}),
        SimpleNamespace(id="b", state="running", summary={"state": "complete", "n_points": 3}),
        SimpleNamespace(id="c", state="crashed", summary={}),
        SimpleNamespace(id="d", state="killed", summary={"state": "killed", "n_points": 0}),
    ]
    tracker = WandbTracker({"mode": "online"}, StudyRecord("key", "study", "f1", Path("run")))
    monkeypatch.setattr(tracker, "_server_runs", lambda: runs)
    assert tracker.known() == {
        "a": Known("paused", 3),
        "b": Known(None, 3),
        "c": Known(None, -1),
        "d": Known("killed", 0),
    }
