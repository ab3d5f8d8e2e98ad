"""The table of optimization levels, and when compiling pays off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.advisor.plan.config import GivenFigures
from lightning_bge.advisor.plan.cost_model import HOUR, Calibration, MeasuredTrial, TrialCost
from lightning_bge.advisor.plan.levels import (
    Level,
    Variants,
    compile_attempt,
    describe_break_even,
    measure_variants,
    optimization_levels,
)
from lightning_bge.advisor.plan.predict import Scenario, StudyCosts, predict
from lightning_bge.advisor.plan.short_study import InEffect
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from tests.helpers.planned_texts import PlannedTexts
from tests.helpers.small_search import make, write_files

NONE = PrunerConfig("none")
COST = TrialCost(start=0.0, fold=10.0, epoch=0.0, train=80.0, validation=20.0, epochs=2)
COSTS = StudyCosts([COST], Calibration((MeasuredTrial({}, {}, COST, 0.8, 0.01, 0.0),), steps=100, read=5.0, took=60.0))
STUDY = Scenario(36, Steps(2, 2), PrunerConfig(), learns=False, refit=False)
COMPUTE, REST, RELOAD = 36 * 4 * 100 / HOUR, 36 * 2 * 10 / HOUR, 36 * 2 * 5 / HOUR


def table(scenario: Scenario = STUDY, **changes: Any) -> dict[str, Level]:
    options = {
        "variants": Variants(padded=2.0, fp32=4.0),
        "in_effect": InEffect("cpu", "bf16-mixed", "packed"),
        "compile": CompileConfig("never"),
        **changes,
    }
    found = optimization_levels(scenario, COSTS, predict(scenario, COSTS), **options)
    return {level.name: level for level in found}


def test_each_level_follows_from_the_one_before() -> None:
    found = table()
    hours = [level.hours for level in found.values()]
    # fp32 and padded takes 4 times as long, bf16 and padded twice; then the encoder is no longer read for each fold
    assert hours[0] == pytest.approx(4 * COMPUTE + REST + RELOAD)
    assert hours[1] == hours[2] == pytest.approx(2 * COMPUTE + REST + RELOAD)
    assert hours[3] == hours[4] == hours[5] == hours[6] == pytest.approx(COMPUTE + REST + RELOAD)
    assert found["+encoder cache"].hours == pytest.approx(COMPUTE + REST)
    assert found["+pruning"].hours < 0.7 * (COMPUTE + REST)
    assert found["none"].how == f"36 trials x {(4 * COMPUTE + REST + RELOAD) * 60 / 36:.1f} min"
    assert found["+bf16"].how == "steps x 0.500"
    assert (found["+bf16"].basis, found["+packing"].how) == ("measured", "steps x 0.500")
    assert found["+TF32"].basis == "not available"
    assert found["+encoder cache"].how == "36 trials x 2 folds without reading the encoder: 6.0 min less"


def test_what_was_not_measured_is_predicted_or_unknown() -> None:
    found = table(variants=Variants())
    assert found["+bf16"].basis == "predicted"
    assert "assumed to be twice as fast" in found["+bf16"].how
    assert found["none"].hours == pytest.approx(2 * COMPUTE + REST + RELOAD)
    assert found["+packing"].basis == "in effect"
    fp32 = InEffect("cpu", "32-true", "packed")
    assert table(in_effect=fp32, variants=Variants())["none"].basis == "unknown"
    elsewhere = table(in_effect=None, variants=Variants())
    assert [elsewhere[name].basis for name in ("none", "+bf16", "+TF32", "+packing")] == ["unknown"] * 4


def test_fp16_has_a_level_of_its_own() -> None:
    found = table(in_effect=InEffect("cpu", "16-mixed", "packed"))
    assert (found["+fp16"].how, "+bf16" in found) == ("steps x 0.500", False)


def test_max_autotune_is_in_effect_only_where_layers_are_compiled() -> None:
    tuned = CompileConfig("auto", mode="max-autotune")
    assert table(compile=tuned)["+max-autotune"][2:] == ("compile.policy auto, compile.mode max-autotune", "off")
    assert table(compile=replace(tuned, policy="always"))["+max-autotune"].basis == "in effect"


def test_the_training_of_a_worker_has_the_epochs_of_its_trials() -> None:
    costs = replace(COSTS, trials=[replace(COST, epochs=1), COST])
    # 36 trials, 2 folds, on average 1.5 epochs of 80 s, of which pruning leaves a quarter, on two workers
    assert costs.training(replace(STUDY, workers=2), 0.25) == 36 * 2 * 1.5 * 80 / 4 / 2


def test_an_optimization_that_is_off_changes_nothing_and_names_its_option() -> None:
    found = table(replace(STUDY, pruner=NONE), in_effect=InEffect("cpu", "32-true", "padded"), variants=Variants())
    assert "trainer.precision is 32-true" in found["+bf16"].how
    assert "attention is padded" in found["+packing"].how
    assert "compile.policy is never" in found["+compile"].how
    assert found["+pruning"].how == "hpo.pruner.name is none"
    assert {found[name].hours for name in ("none", "+bf16", "+packing", "+compile")} == {found["none"].hours}


def test_a_module_of_another_project_has_no_levels_of_the_encoder() -> None:
    found = table(compile=None, in_effect=InEffect("cpu", "bf16-mixed", "unknown"), variants=Variants(fp32=1.5))
    assert list(found) == ["none", "+bf16", "+TF32", "+pruning"]
    assert found["none"].hours == pytest.approx(1.5 * COMPUTE + REST + RELOAD)
    assert found["+bf16"].how == "steps x 0.667"


def test_workers_are_a_level() -> None:
    alone, shared = table(), table(replace(STUDY, workers=4))
    assert shared["+workers"].hours == alone["+encoder cache"].hours / 4
    assert "+workers" not in alone


def test_compiling_is_tried_only_where_the_study_would_try() -> None:
    auto, long = CompileConfig("auto", time_limit=50.0), replace(STUDY, n_trials=2000)
    quick = replace(COST, train=0.1)
    known = Calibration((replace(COSTS.calibration.trials[0], cost=quick),), steps=100)
    seconds, reason = compile_attempt(replace(STUDY, n_trials=1), StudyCosts([quick], known), 1.0, auto)
    assert seconds == 0.0
    assert "could be saved, compiling takes at least" in reason
    assert compile_attempt(long, COSTS, 1.0, auto)[0] == 50.0
    assert compile_attempt(long, COSTS, 1.0, CompileConfig("always"))[0] == 0.0
    assert "in at most 50 s" in table(long, compile=auto)["+compile"].how


def test_break_even_of_compiling() -> None:
    text = describe_break_even(STUDY, COSTS, 1.0, GivenFigures())
    assert "60 s of compiling pay off after 500 optimizer steps if these become 15% shorter" in text
    # 36 trials x 2 folds x 2 epochs x 100 steps of 0.8 s
    assert "each worker trains 14,400 steps: 28.8 min - 60 s = 27.8 min" in text


def test_variants_are_measured_where_there_is_time_for_them(tmp_path: Path) -> None:
    build, asked = make(write_files(tmp_path)).build, []
    params = {"lr": 1e-3, "dropout": 0.1}

    def spied(changed: dict[str, Any]) -> TextTrialSetup:
        asked.append({name: value for name, value in changed.items() if name not in params})
        return build(changed)

    trial = MeasuredTrial(params, {}, COST, 0.5, 0.01, 0.0)
    bf16 = InEffect("cpu", "bf16-mixed", "packed")
    # 4 steps after 2 of warm-up, of a second each if twice as slow
    found = measure_variants(PlannedTexts(spied), trial, bf16, 6.0)
    assert found.padded is not None
    assert found.padded > 0
    assert found.fp32 is None
    assert measure_variants(PlannedTexts(spied), trial, bf16, 5.9) == Variants()
    assert measure_variants(PlannedTexts(spied), trial, InEffect("cpu", "32-true", "padded"), 1e9) == Variants()
    assert asked == [{"model.attention": "padded"}]
