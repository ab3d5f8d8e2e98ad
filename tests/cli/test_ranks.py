"""A study whose trials are trained by two processes each: the same study, and what is left when one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.trials import ended_parameter_sets
from tests.helpers.cli_sample import write_sample_with_model
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
LIMIT_SECONDS = 400


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_with_model(tmp_path_factory.mktemp("sample"))


def command(sample: Path, run: Path, devices: int) -> list[str]:
    space = (
        '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": true}, "data.batch_size": {"choices": [8, 16]}}'
    )
    return [
        *(sys.executable, "-m", "lightning_bge.cli", "hpo", "--run_dir", str(run), "--hpo.space", space),
        *("--model.name_or_path", str(sample / "model"), "--data.train_file", str(sample / "train.csv")),
        *("--data.text_columns", "[text, criterion]", "--data.group_column", "post_id", "--data.max_length", "64"),
        *("--data.cache_dir", str(sample / "cache"), "--data.split.folds", "2", "--trainer.max_epochs", "2"),
        *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.devices", str(devices)),
        *("--model.dropout", "0.0"),  # its masks differ between ranks
        *("--hpo.n_trials", "6", "--hpo.baseline", "false", "--hpo.sampler.name", "random"),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def trials(run: Path) -> list[FrozenTrial]:
    loaded = load_study(run)
    assert loaded is not None
    return loaded[0].trials


def curves(found: list[FrozenTrial]) -> dict[str, dict[int, float]]:
    """The reports of each parameter set."""
    known: dict[str, dict[int, float]] = {}
    for trial in found:
        known.setdefault(str(sorted(trial.params.items())), {}).update(trial.intermediate_values)
    return known


@pytest.fixture(scope="module")
def alone(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> list[FrozenTrial]:
    """The trials of the study with one process each."""
    run = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run(command(sample, run, 1), env=environment(), check=True, capture_output=True, timeout=LIMIT_SECONDS)
    return trials(run)


def test_two_processes_make_the_same_study(sample: Path, alone: list[FrozenTrial], tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run(command(sample, run, 2), env=environment(), check=True, capture_output=True, timeout=LIMIT_SECONDS)
    found = trials(run)
    assert [(trial.state, trial.params) for trial in found] == [(trial.state, trial.params) for trial in alone]
    assert sum(trial.state == TrialState.PRUNED for trial in found) >= 3
    for trial, known in zip(found, alone, strict=True):
        assert trial.intermediate_values == pytest.approx(known.intermediate_values, abs=1e-5)
        assert (trial.value if trial.state == TrialState.COMPLETE else 0.0) == pytest.approx(
            known.value if known.state == TrialState.COMPLETE else 0.0, abs=1e-5
        )
    assert (run / "model" / "config.json").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_no_trial_is_lost_when_one_of_them_is_killed(
    sample: Path, alone: list[FrozenTrial], tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(sample, run, 2), env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("[2/6]"):
            break
    time.sleep(0.3)  # in the middle of the next trial
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "worker" in one.cmdline()]
    [chosen] = [one for one in workers if ("--rank" in one.cmdline()) == bool(rank)]
    chosen.kill()
    printed.append(process.communicate(timeout=LIMIT_SECONDS)[0])
    assert process.returncode == 0, "".join(printed)
    assert "is replaced" in "".join(printed)
    found = trials(run)
    assert not any(trial.state == TrialState.RUNNING for trial in found)
    assert ended_parameter_sets(found) == 6
    known, made = curves(alone), curves(found)
    common = known.keys() & made.keys()  # later parameter sets are drawn by the numbers of their trials
    assert len(common) >= 3
    for name in common:
        same = {step: value for step, value in made[name].items() if step in known[name]}
        assert same == pytest.approx({step: known[name][step] for step in same}, abs=1e-5)
