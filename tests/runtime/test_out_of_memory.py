"""Under a real limit on the address space: `fit` goes on with less, and a search loses nothing but what can't fit."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.small_models import VOCABULARY, small_model, word_tokenizer

LONGEST = 4096

# Runs the program with so many MiB of address space more than it has after its imports. What the trials of a search
# hold is written down.
LIMITED = """
import json, resource, sys
from lightning_bge.cli.main import main
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.runtime.memory import live_bytes, process_bytes, release

mebibytes, record, *args = sys.argv[1:]
sys.argv = ["lightning-bge", *args]
call = Objective.__call__

def held():
    release()
    return live_bytes(), process_bytes()["VmRSS"]

def watched(self, trial):
    before = held()
    try:
        return call(self, trial)
    finally:
        # after the exception is gone: the next trial's figures tell
        with open(record, "a") as file:
            print(json.dumps({"trial": trial.number, "before": before, "encoder": self.encoder.nbytes}), file=file)

Objective.__call__ = watched
if int(mebibytes):
    most = process_bytes()["VmSize"] + int(mebibytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
main()
"""


def run(folder: Path, mebibytes: int, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(mebibytes), str(folder / "record.jsonl"), *args]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limited")
    shape = {"max_position_embeddings": LONGEST, "hidden_size": 64, "num_attention_heads": 8}
    small_model("bert", outputs=1, dropout=0.0, **shape).save_pretrained(path / "model")
    word_tokenizer().save_pretrained(path / "model")
    random = np.random.default_rng(0)
    with (path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text_a", "text_b", "label"])
        for row in range(48):
            words = " ".join(random.choice(VOCABULARY[5:], size=LONGEST))
            writer.writerow([words, VOCABULARY[5 + row % 7], row % 2])
    return path


def settings(folder: Path, name: str) -> list[str]:
    return [
        *("--run_dir", str(folder / name), "--model.name_or_path", str(folder / "model")),
        *("--data.train_file", str(folder / "train.csv"), "--data.cache_dir", str(folder / "cache")),
        *("--data.batching.num_workers", "0", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
        *("--model.optimizer.lr", "1e-3", "--compile.policy", "never"),
    ]


def fit(folder: Path, name: str, mebibytes: int) -> tuple[dict[str, Any], str]:
    batches = ["--data.batch_size", "16", "--data.max_length", "1024", "--data.table.max_rows", "24"]
    batches += ["--data.batching.max_tokens", "100000"]
    done = run(folder, mebibytes, "fit", *settings(folder, name), *batches, "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr
    return load_file(folder / name / "model" / "model.safetensors"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_fit_goes_on_with_smaller_micro_batches_to_the_same_weights(folder: Path) -> None:
    expected, words = fit(folder, "free", 0)
    assert "out of memory" not in words
    found, words = fit(folder, "limited", 900)
    assert "continuing with micro-batches of at most" in words
    for name, weight in expected.items():
        # a key's bias has no gradient but for rounding, of which AdamW makes steps as large as any
        most = 4e-3 if name.endswith("key.bias") else 1e-4
        assert (found[name] - weight).abs().max() <= most * max(1.0, weight.abs().max()), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_a_search_prunes_what_cannot_fit_and_keeps_nothing_of_it(folder: Path) -> None:
    space = {"data.max_length": {"choices": [16, LONGEST]}, "model.optimizer.lr": {"low": 1e-4, "high": 1e-2}}
    asked = [
        "--hpo.n_trials",
        "8",
        "--hpo.space",
        json.dumps(space),
        "--hpo.sampler.name",
        "random",
        "--hpo.refit",
        "false",
    ]
    more = [
        "--hpo.baseline",
        "false",
        "--data.split.folds",
        "2",
        "--trainer.max_epochs",
        "1",
        "--hpo.pruner.name",
        "none",
    ]
    done = run(folder, 800, "hpo", *settings(folder, "study"), *asked, *more)
    assert done.returncode == 0, done.stderr
    with (folder / "study" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    impossible = [trial["data.max_length"] == str(LONGEST) for trial in trials]
    assert 2 <= sum(impossible) <= 6
    for trial, huge in zip(trials, impossible, strict=True):
        assert trial["state"] == ("PRUNED" if huge else "COMPLETE")
        assert bool(trial["oom_where"]) == huge
        assert bool(trial["oom_requested"]) == huge
    records = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    assert len(records) == 8
    for earlier, later, huge in zip(records, records[1:], impossible, strict=False):
        if huge and earlier["trial"] > 0:
            (live, resident), (live_then, resident_then) = earlier["before"], later["before"]
            assert live_then == live
            assert resident_then <= resident * 1.1
