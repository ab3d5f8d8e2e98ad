"""The benchmark of batch size finders: what it compares, and that ours does not run out of memory under real limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import BENCHMARKS as FOLDER

pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")
# the record's versions and hardware are taken with transformers' Trainer at hand
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import batch_size_finder

    return batch_size_finder


def test_both_are_compared_where_both_have_finished(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(finder: str, kind: str, room: int, share: float) -> dict[str, Any]:
        fails = finder == "lightning" and kind == "cnn"
        speed = {"ours": 90.0, "lightning": 100.0}[finder] + room
        end = {"end": "exit status -9" if fails else "finished", "samples_per_s": None if fails else speed}
        return {"finder": finder, "module": kind, "room_mib": room, "batch_size": room, **end}

    monkeypatch.setattr(benchmark, "run", run)
    out = tmp_path / "found.json"
    benchmark.main(["--limits", "3", "--timed-limits", "2", "--rooms", "100", "400", "--out", str(out)])
    record, text = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert [one["room_mib"] for one in record["alone"][::3]] == [100, 200, 400]
    assert len(record["in_turns"]) == 2 * 3 * 2 * 3
    assert [one["finder"] for one in record["in_turns"][:4]] == ["ours", "lightning"] * 2
    assert record["lowest_ratio"] == pytest.approx(190 / 200)
    assert record["unfinished"] == 0
    assert [row["ratio"] is None for row in record["compared"]] == [False, True, False] * 2
    assert "exit status -9" in text
    assert str(tmp_path) not in out.read_text() + text
    assert "Lowest ratio: 0.95." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_ours_does_not_run_out_of_memory_under_a_real_limit(kind: str, benchmark: Any) -> None:
    for room in benchmark.rooms(4, 80, 600):
        found = benchmark.run("ours", kind, room, 0.1)
        assert found["end"] == "finished", found
        assert found["effective_batch"] == benchmark.KINDS[kind].batch_size
