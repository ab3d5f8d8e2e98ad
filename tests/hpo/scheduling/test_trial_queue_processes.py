"""Several processes that start at the same moment share one study."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.space.draw import SamplerConfig, draw_parameter_set
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import WORKERS
from lightning_bge.hpo.trials import attempts, key_of, one_trial_each
from tests.helpers.fake_study import SPACE

GRID = {"x": {"choices": [1, 2, 3, 4]}, "y": {"low": 0.0, "high": 1.0, "step": 0.2}}  # 24 parameter sets


def run_processes(run_dir: Path, count: int, **options: Any) -> optuna.Study:
    """Start processes, let them go at once, and wait for all of them."""
    command = [sys.executable, "-m", "tests.helpers.fake_study", str(run_dir), json.dumps(options)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * count  # type: ignore[union-attr]
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    made = [int(process.communicate(timeout=120)[0].split()[-1]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    [study] = open_storage(run_dir / "journal.log").get_all_studies()
    found = optuna.load_study(study_name=study.study_name, storage=open_storage(run_dir / "journal.log"))
    assert sum(made) == len(found.trials)
    return found


@pytest.mark.parametrize(
    ("sampler", "space"),
    [
        pytest.param("random", SPACE, marks=pytest.mark.slow),
        pytest.param("tpe", SPACE, marks=pytest.mark.slow),
        pytest.param("random", GRID, marks=pytest.mark.slow),
        ("tpe", GRID),
    ],
)
def test_four_processes_try_each_parameter_set_once(tmp_path: Path, sampler: str, space: dict[str, Any]) -> None:
    study = run_processes(tmp_path / "run", 4, sampler={"name": sampler}, space=space, n_trials=20)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 20
    assert len({key_of(trial.params) for trial in study.trials}) == 20
    assert len({trial.user_attrs["worker"]["id"] for trial in study.trials}) > 1
    assert not list((tmp_path / "run" / WORKERS).glob("*.lock"))
    if sampler == "random" and space is SPACE:  # the same sets as those of one process
        for ordinal, trial in enumerate(study.trials):
            config = SamplerConfig("random")
            alone = draw_parameter_set(study, parse_space(space), config, seen=[], ordinal=ordinal, taken=set())
            assert alone is not None
            assert alone.params == trial.params


@pytest.mark.slow
def test_four_processes_end_together_in_a_space_that_is_smaller_than_the_study(tmp_path: Path) -> None:
    study = run_processes(tmp_path / "run", 4, space=GRID, n_trials=100)
    assert len({key_of(trial.params) for trial in study.trials}) == len(study.trials) == 24


def test_four_processes_resume_each_paused_trial_once_and_tpe_sees_each_parameter_set_once(tmp_path: Path) -> None:
    # the first ones are good, each a little worse than the one before, so that they pause and are resumed later
    first = [{"x": 0.7 - 0.02 * number, "y": 0.7} for number in range(10)]
    pruner = {"name": "asha", "reduction_factor": 2, "min_resource": 2}
    study = run_processes(tmp_path / "run", 4, pruner=pruner, n_trials=20, enqueue=first)
    made = attempts(study.trials)
    assert len(made) == 20
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    resumed = [trial.user_attrs["resumes"] for trial in study.trials if "resumes" in trial.user_attrs]
    assert resumed
    assert len(set(resumed)) == len(resumed)
    for tries in made.values():
        assert len({key_of(trial.params) for trial in tries}) == 1
        steps = [len(trial.intermediate_values) for trial in tries]
        assert steps == sorted(set(steps))  # each goes on where the one before it paused
    seen = one_trial_each(study.trials)
    assert len({key_of(trial.params) for trial in seen}) == len(seen) == 20
    assert {trial.number for trial in seen} == {tries[-1].number for tries in made.values()}
