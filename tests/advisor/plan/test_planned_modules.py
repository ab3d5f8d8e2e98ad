"""Plans of modules of other projects, whose batches take known seconds by a clock that only the test moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_bge.advisor.plan import short_study
from lightning_bge.advisor.plan.cost_model import features
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.tuning import plan as plan_study
from tests.helpers.slow_project import CLOCK, SlowFolds, SlowNet

Run = Callable[..., tuple[int, str, str]]
HERE = "tests.helpers.slow_project"
SPACE = {
    "model.init_args.lr": {"low": 0.001, "high": 0.1, "log": True},
    "data.init_args.batch_size": {"choices": [5, 8]},
}


@pytest.fixture
def plan(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `plan` with some options, given as YAML; 30 rows in each of two folds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(short_study, "_clock", CLOCK)

    def call(*args: str, **changes: Any) -> tuple[int, str, str]:
        given = {
            "run_dir": "run",
            "model": {"class_path": f"{HERE}.SlowNet"},
            "data": {"class_path": f"{HERE}.SlowFolds"},
            "trainer": {"max_epochs": 3, "accelerator": "cpu"},
            "hpo": {"n_trials": 8, "space": SPACE, "baseline": False, "pruner": {"name": "none"}},
            **changes,
        }
        Path("my.yaml").write_text(yaml.safe_dump(given))
        return run("plan", "-c", "my.yaml", "--json", "plan.json", *args)

    return call


def cost(place: str = "plan.json") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plan, and the costs of its measured trials."""
    plain = yaml.safe_load(Path(place).read_text())
    return plain, [trial["cost"] | {"params": trial["params"]} for trial in plain["calibration"]["trials"]]


@pytest.mark.parametrize("pruner", ["none", "asha"])
def test_batches_are_scaled_to_those_of_an_epoch(plan: Run, pruner: str) -> None:
    hpo = {"n_trials": 8, "space": SPACE, "baseline": False, "pruner": {"name": pruner}}
    status, out, err = plan(hpo=hpo)
    assert status == 0, err
    plain, costs = cost()
    assert {one["params"]["data.init_args.batch_size"] for one in costs} == {5, 8}
    for one in costs:
        size = one["params"]["data.init_args.batch_size"]
        assert one["train"] == pytest.approx({5: 6, 8: 4}[size] * 2.0)  # 2 s for each training batch
        assert one["validation"] == pytest.approx(3 * 0.5)  # three batches of 10 rows
    assert "2 folds, at most 3 epochs per fold" in out
    assert "batches take the same time, and each fold has as many as the first" in out
    assert re.findall(r"^  (none|\+\S+)", out, re.MULTILINE) == ["none", "+bf16", "+TF32", "+pruning"]
    assert "break-even of +compile" not in out
    assert "a single split" not in out
    assert plain["break_even"] is None
    assert not Path("run").exists()


def test_the_trainer_of_the_options_decides_how_many_batches_an_epoch_has(plan: Run) -> None:
    trainer = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "limit_train_batches": 3,
        "limit_val_batches": 0.34,
        "accumulate_grad_batches": 3,
    }
    status, _, err = plan(trainer=trainer)
    assert status == 0, err
    plain, costs = cost()
    assert {one["train"] for one in costs} == {6.0}
    assert {one["validation"] for one in costs} == {0.5}
    assert plain["calibration"]["steps"] == 1


def test_steps_may_be_given(plan: Run) -> None:
    space = {"model.init_args.lr": SPACE["model.init_args.lr"]}
    hpo = {"n_trials": 8, "space": space, "baseline": False, "pruner": {"name": "none"}}
    status, out, err = plan("--given.step_ms", "500", hpo=hpo)
    assert status == 0, err
    assert "figures as given, nothing was measured" in out
    assert "steps 2.50 s" in out  # five batches of 6 rows


def test_a_loader_without_a_length_needs_a_limit(plan: Run) -> None:
    data = {"class_path": f"{HERE}.Endless"}
    space = {"model.init_args.lr": SPACE["model.init_args.lr"]}
    hpo = {"n_trials": 8, "space": space, "baseline": False, "pruner": {"name": "none"}}
    status, _, err = plan(data=data, hpo=hpo)
    assert status == 2
    assert "trainer.limit_train_batches: expected a number of batches, as a loader does not know its length" in err
    trainer = {"max_epochs": 3, "accelerator": "cpu", "limit_train_batches": 4}
    assert plan(data=data, hpo=hpo, trainer=trainer)[0] == 0


def test_options_that_need_our_module_are_refused(plan: Run) -> None:
    status, _, err = plan(hpo={"space": SPACE, "ensemble": True})
    assert status == 2
    assert "hpo.ensemble: expected false for a module of another project" in err


def test_learning_rates_of_any_module_change_no_time() -> None:
    space = parse_space(SPACE)
    assert list(features({"model.init_args.lr": 0.01, "data.init_args.batch_size": 5}, space)) == [
        "data.init_args.batch_size"
    ]


def test_the_study_of_a_function_is_planned_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_study, "_clock", CLOCK)

    def build(params: dict[str, Any]) -> Any:
        return SlowNet(**params), SlowFolds(batch_size=10)

    space = {"lr": {"low": 0.001, "high": 0.1, "log": True}, "width": {"choices": [4, 16]}}
    found = plan_study(build, space, n_trials=20, max_epochs=2, trainer={"accelerator": "cpu"})
    [cost] = {trial.cost.train for trial in found.calibration.trials}
    assert cost == pytest.approx(3 * 2.0)
    assert found.scenario.steps.folds == 2
    assert found.by_batches
    with pytest.raises(ConfigError, match=r"plan: expected plan\(model, data, space, ...\).* got int"):
        plan_study(3)  # type: ignore[call-overload]
