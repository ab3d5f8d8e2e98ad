"""Plans of a study whose steps are given, and of the generated sample by the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.advisor.plan import predict as predict_module
from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.advisor.plan.cost_model import HOUR
from lightning_bge.advisor.plan.plan import make_plan
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.text_experiment import TextExperiment
from tests.helpers.paths import CONFIGS
from tests.helpers.small_experiment import DOTTED_SPACE, small_experiment

quiet_optuna()
NONE = PrunerConfig("none")
HPO = StudyConfig(12, DOTTED_SPACE, pruner=NONE, refit=False, baseline=False, sampler=SamplerConfig("random"))
GIVEN = PlanConfig(given=GivenFigures(step_ms=1000.0, start_s=60.0))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> TextExperiment:
    """20 rows in each of two folds, in batches of 8: three steps; three epochs."""
    return small_experiment(tmp_path_factory.mktemp("plan"), epochs=3)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of constant speed."""
    monkeypatch.setattr(predict_module, "DRIFT", 0.0)


@pytest.mark.usefixtures("steady")
def test_with_given_figures_the_hours_are_plain_arithmetic(experiment: TextExperiment) -> None:
    found = make_plan(experiment, HPO, GIVEN)
    trial = 2 * (1 + 3 * (3 * 1.0 + 1))
    assert found.prediction.mid == 12 * trial + 60
    text = str(found)
    assert "study: 12 trials, 2 folds, at most 3 epochs per fold, pruner none, 1 worker" in text
    assert "estimated time 0:06:12 (80% interval 0:06:12 to 0:06:12)" in text
    assert "figures as given, nothing was measured" in text
    assert "2 x (fold 1.00 s + 3 x (steps 3.00 s + validation 1.00 s + 0.00 s)) + 0.00 s = 26 s" in text
    more = make_plan(experiment, replace(HPO, refit=True, seed_replicates=2, baseline=True), GIVEN)
    # the best five with two seeds, the configured options, and a refit of 2.4 epochs (0.8 x 3) on twice as many rows
    assert more.prediction.mid == pytest.approx(found.prediction.mid + 11 * trial + 2.4 * 6.0)


@pytest.mark.usefixtures("steady")
def test_workers_and_trials(experiment: TextExperiment) -> None:
    found = make_plan(experiment, HPO, replace(GIVEN, workers=4))
    trial = 2 * (1 + 3 * 4)
    assert found.prediction.mid == 3 * trial + 60
    assert "each worker has its own device, as fast as this one" in found.assumptions
    changes = {one.change: one.mid * HOUR for one in found.what_ifs}
    assert changes["8 workers"] == pytest.approx(2 * trial + 60)
    assert changes["6 trials"] == pytest.approx(2 * trial + 60)
    # one split of 32 rows and 8: as the trial's parts grow with their rows
    split = 1 + 3 * (3 * 1.0 * 0.8 / 0.5 + 1 * 0.2 / 0.5)
    assert changes["a single split"] == pytest.approx(3 * split + 60)
    assert changes["pruner asha"] < found.prediction.mid


def test_parts_that_are_not_given_are_rough_estimates(experiment: TextExperiment) -> None:
    found = make_plan(experiment, HPO, PlanConfig(given=GivenFigures(step_ms=1000.0)), process_s=7.0)
    [trial] = found.calibration.trials
    assert trial.cost.validation == pytest.approx(1.0)  # as many rows as are trained on, for a third of their time
    assert trial.cost.fold == 1.0
    assert found.calibration.start == pytest.approx(7.0 * 1.15)  # the start of this process, and its end
    assert found.assumptions[0].endswith("parts that were not given are rough estimates")


def test_a_plan_that_misses_its_deadline_names_the_changes_that_meet_it(experiment: TextExperiment) -> None:
    found = make_plan(experiment, HPO, replace(GIVEN, deadline=0.075))
    assert found.late
    assert found.prediction.mid / HOUR == pytest.approx(0.1033, rel=0.1)
    assert all(fix.high <= 0.075 for fix in found.fixes)
    assert found.fixes[0].flags == "start hpo 2 times"  # without an effect on the result
    [trials] = [int(fix.flags.split()[1]) for fix in found.fixes if fix.flags.startswith("--hpo.n_trials")]
    assert 4 <= trials < 12
    more = make_plan(experiment, replace(HPO, n_trials=trials + 1), replace(GIVEN, deadline=0.075))
    assert more.late  # as many as there is time for, and no more
    text = str(found)
    assert "DEADLINE MISSED: the study may take 6." in text
    assert "more than 4.5 min" in text
    assert text.index("start hpo 2 times") < text.index(f"--hpo.n_trials {trials}")


def test_a_deadline_that_is_met_and_one_that_no_change_meets(experiment: TextExperiment) -> None:
    assert "deadline 2.00 h: met" in str(make_plan(experiment, HPO, replace(GIVEN, deadline=2.0)))
    missed = make_plan(experiment, HPO, replace(GIVEN, deadline=0.01))
    assert missed.fixes == ()
    assert "No number of trials or workers meets it" in str(missed)


def test_a_pruner_that_can_never_prune_is_a_warning(experiment: TextExperiment) -> None:
    found = make_plan(experiment, replace(HPO, pruner=PrunerConfig("wilcoxon")), GIVEN)
    assert "'wilcoxon' could never prune with 12 trials of 6 steps" in found.warnings[0]
    assert found.prediction.share == (1.0, 1.0, 1.0)
    assert str(found).startswith("WARNING: hpo.pruner: 'wilcoxon' could never prune")


def test_a_plan_is_plain_data(experiment: TextExperiment) -> None:
    found = make_plan(experiment, replace(HPO, pruner=PrunerConfig()), GIVEN)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["calibration"]["trials"][0]["cost"]["fold"] == 1.0
    assert plain["prediction"]["mid"] == found.prediction.mid
    assert plain["scenario"]["steps"] == {"folds": 2, "epochs": 3, "per_epoch": 1}
    assert plain["assumptions"] == list(found.assumptions)


# ---------------------------------------------------------------------- on the command line


@pytest.fixture
def program(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The program, in a folder and with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    return run


def test_the_quickstart_is_planned_by_a_measurement(program: Callable[..., Any], tmp_path: Path) -> None:
    assert program("sample", "runs/sample")[0] == 0
    config = str(CONFIGS / "quickstart.yaml")
    status, out, err = program("plan", "-c", config, "--seconds", "4", "--json", "plan.json", "--deadline", "0.0001")
    assert status == 0, err
    assert "quickstart: 24 trials, 3 folds, at most 3 epochs per fold, pruner asha, 1 worker" in out
    assert re.search(r"estimated time \d+:\d\d:\d\d \(80% interval \d+:\d\d:\d\d to \d+:\d\d:\d\d\)", out)
    assert "DEADLINE MISSED" in out
    assert "needs an NVIDIA GPU of compute capability 8.0; the device is cpu" in out
    assert "break-even of +compile: 60 s of compiling pay off after" in out
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert plain["schema_version"] == 1
    known = plain["calibration"]
    assert known["steps"] > 1
    assert known["took"] > 0
    assert min(trial["cost"]["train"] for trial in known["trials"]) > 0
    assert known["end"] > 0  # with the refit and the test file
    # nothing is left behind, and no study was begun
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sample"]
    options = ("--given.step_ms", "20", "--hpo.n_trials", "2000", "--workers", "4")
    status, out, err = program("plan", "-c", config, *options)
    assert status == 0, err
    assert "quickstart: 2,000 trials" in out
    assert "+workers" in out


def test_a_wrong_option_ends_with_a_message(program: Callable[..., Any]) -> None:
    assert program("sample", "runs/sample")[0] == 0
    status, _, err = program("plan", "-c", str(CONFIGS / "quickstart.yaml"), "--given.compile_gain", "2")
    assert status == 2
    assert "given.compile_gain: expected a number from 0 to below 1" in err


def test_help_names_the_options(program: Callable[..., Any]) -> None:
    status, out, _ = program("plan", "--help")
    assert status == 0
    for name in ("--deadline", "--given.step_ms", "--given.compile_gain", "--workers"):
        assert name in out
