"""The main job as the README gives it, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sentence_transformers import CrossEncoder
from sklearn.metrics import f1_score

from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_the_quickstart_prunes_fails_nothing_and_beats_the_majority_by_far(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_BGE_CACHE": str(tmp_path / "cache")}
    program = [sys.executable, "-m", "lightning_bge.cli"]
    config = str(ROOT / "configs" / "quickstart.yaml")
    for command in (["sample", "runs/sample"], ["hpo", "-c", config]):
        subprocess.run([*program, *command], cwd=tmp_path, env=environment, check=True, timeout=900)
    folder = tmp_path / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_trials"] == 24
    assert summary["n_complete"] > 0
    assert summary["n_pruned"] > 0
    assert summary["n_failed"] == 0
    for value in (summary["best_value"], summary["out_of_fold"]["f1"], summary["test"]["f1"]):
        assert value > summary["majority_baseline"] + 0.2
    rows = pd.read_csv(tmp_path / "runs" / "sample" / "test.csv")
    pairs = list(zip(rows["text"], rows["criterion"], strict=True))
    scores = CrossEncoder(str(tmp_path / summary["model_dir"]), device="cpu").predict(pairs)
    found = f1_score(rows["label"], scores >= summary["threshold"])
    assert found == pytest.approx(summary["test"]["f1"], abs=0.01)  # the peer computes in fp32
