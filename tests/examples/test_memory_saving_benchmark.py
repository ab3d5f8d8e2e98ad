"""The benchmark of ways to save memory runs end to end on a tiny model, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.paths import BENCHMARKS as FOLDER
from tests.helpers.small_models import save_model

pytestmark = [
    # the record's versions and hardware are taken with transformers' Trainer at hand
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"),
]


def test_the_record_and_the_note_hold_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")
    monkeypatch.syspath_prepend(FOLDER)
    import memory_saving

    monkeypatch.setattr(memory_saving, "fresh", lambda function, *args: function(*args))
    model, out = save_model(tmp_path / "model", dropout=0.1), tmp_path / "out" / "memory_saving.json"
    sizes = ["--max-length", "64", "--tokens", "256", "--batch", "6", "--steps", "1", "--warmup", "1", "--rounds", "2"]
    memory_saving.main(["--model", model, "--out", str(out), "--device", "cpu", *sizes])

    record, note = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    assert str(tmp_path) not in out.read_text() + note
    names = list(memory_saving.contenders(2))
    assert [run["contender"] for run in record["runs"]] == names * 2
    medians = record["medians"]
    plain = medians[memory_saving.PLAIN]
    assert plain["state_mib"] == pytest.approx(2 * plain["gradients_mib"], rel=1e-2)
    for name in names[2:5]:  # frozen embeddings, frozen layers, LoRA
        assert medians[name]["state_mib"] < plain["state_mib"]
        assert medians[name]["gradients_mib"] < plain["gradients_mib"]
        assert name in note
    assert record["contenders"]["gradient checkpointing"]["model"]["gradient_checkpointing"] is True
    assert all(run["samples_per_s"] == pytest.approx(6 / run["seconds"]) for run in record["runs"])
    assert "memory, MiB" in capsys.readouterr().out


def test_micro_batches_are_full_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")
    monkeypatch.syspath_prepend(FOLDER)
    import memory_saving

    work = memory_saving.parse(
        ["--model", "none", "--device", "cpu", "--max-length", "16", "--tokens", "70", "--batch", "10"]
    )
    batch = memory_saving.micro_batches(work, 50)
    assert [len(micro.lengths) for micro in batch] == [4, 4, 2]
    assert all(micro.cu_seqlens.tolist() == [16 * i for i in range(len(micro.lengths) + 1)] for micro in batch)
    assert all(int(micro.input_ids.max()) < 50 for micro in batch)
