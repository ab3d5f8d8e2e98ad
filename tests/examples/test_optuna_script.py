"""The replay of an Optuna user's script: its two objectives have the same values, with each pruner."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.helpers.paths import BENCHMARKS as FOLDER

pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with two folds of one epoch; what it switches off for its process is restored."""
    monkeypatch.syspath_prepend(FOLDER)
    import optuna_script

    monkeypatch.setattr(optuna_script, "FOLDS", 2)
    monkeypatch.setattr(optuna_script, "EPOCHS", 1)
    verbosity, level = optuna.logging.get_verbosity(), logging.getLogger("lightning.pytorch").level
    yield optuna_script
    optuna.logging.set_verbosity(verbosity)
    logging.getLogger("lightning.pytorch").setLevel(level)


def test_complete_trials_have_the_same_values(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["optuna_script.py", "--rounds", "1", "--trials", "3", "--out", str(out)])
    benchmark.main()
    record = json.loads(out.read_text())
    for pruner in ("MedianPruner", "PercentilePruner"):  # which let the first trials alone
        found = record["pruners"][pruner]
        theirs, ours = (runs[0] for runs in found["runs"].values())
        assert theirs["complete"] == ours["complete"]
        assert len(ours["complete"]) == found["common"] == 3
        assert ours["epochs"] == theirs["epochs"] == 6
    assert record["pruners"].keys() == benchmark.PRUNERS.keys()
    assert "have the same values, bit for bit" in out.with_suffix(".md").read_text().replace("\n", " ")


def test_a_difference_ends_it_with_an_error(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["optuna_script.py", "--rounds", "1", "--trials", "1", "--out", str(out)])
    measure = benchmark.measure

    def wrong(pruner: str, name: str, trials: int) -> dict[str, Any]:
        found = measure(pruner, name, trials)
        return {**found, "complete": {0: 1.0}} if name.startswith("Fold") else found

    monkeypatch.setattr(benchmark, "measure", wrong)
    with pytest.raises(SystemExit, match=r"values differ in the trials \[0\]"):
        benchmark.main()
    assert not out.exists()
