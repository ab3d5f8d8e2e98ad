"""Plans: of a search whose steps are given by hand, and of the generated sample by the command line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.advisor.plan import predict as predict_module
from lightning_bge.advisor.plan import warnings as plan_doubts
from lightning_bge.advisor.plan.calibrate import Calibration, Draw
from lightning_bge.advisor.plan.console import describe_plan, table_of_levels
from lightning_bge.advisor.plan.cost_model import HOUR, Level, TrialCost
from lightning_bge.advisor.plan.levels import PADDED, PLAIN, describe_compile, levels, training_s, trying_s
from lightning_bge.advisor.plan.plan import Known, PlanConfig, Search, load_calibration, make_plan
from lightning_bge.advisor.plan.predict import Priced, Study, predict
from lightning_bge.advisor.plan.scenarios import MOST_WORKERS, Changes
from lightning_bge.advisor.plan.trial_bench import Looks
from lightning_bge.advisor.plan.warnings import Others, doubts, judge_search
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import quiet_optuna
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics import MonitorConfig
from tests.helpers.paths import CONFIGS
from tests.helpers.small_search import SPACE, make, write_files

quiet_optuna()
NONE = PrunerConfig("none")
HAND = PlanConfig(step_ms=1000.0, validation_s=5.0, fold_s=10.0, start_s=60.0)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    """20 rows of each of two folds in batches of 8: three steps."""
    build = make(write_files(tmp_path)).build
    data = build({"lr": 1e-3, "dropout": 0.1}).datamodule
    hpo = StudyConfig(12, SPACE, pruner=NONE, refit=False, sampler="random")
    known = Known(epochs=3, usual=3, process_s=7.0, checks=4)
    settings = (hpo, MonitorConfig("loss"), CompileConfig(), data, tmp_path / "study", EncoderCache(), known)
    return Search(build, *settings)


def with_hpo(search: Search, **changes: Any) -> Search:
    return replace(search, hpo=replace(search.hpo, **changes))


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not drift."""
    monkeypatch.setattr(predict_module, "DRIFT", 0.0)


@pytest.mark.usefixtures("steady")
def test_given_by_hand_the_hours_are_plain_arithmetic(search: Search) -> None:
    found = make_plan(search, HAND)
    trial = 2 * (10 + 3 * (3 * 1.0 + 5))
    assert found.prediction.mid == 12 * trial + 60
    text = describe_plan(found)
    assert "study: 12 trials, 2 folds, at most 3 epochs each, pruner none, 1 worker" in text
    assert "it takes about 0:14:36 (0:14:36 to 0:14:36 in eight studies of ten)" in text
    assert "given by hand, nothing was measured" in text
    assert "2 x (fold 10.00 s + 3 x (steps 3.00 s + validation 5.00 s + 0.00 s)) + 0.00 s = 68 s" in text
    again = make_plan(with_hpo(search, refit=True, seed_replicates=2), HAND)
    # the best five with two seeds, and a refit of 2.4 epochs (0.8 x 3) on twice as many rows
    assert again.prediction.mid == pytest.approx(found.prediction.mid + 10 * trial + 2.4 * 6.0)


@pytest.mark.usefixtures("steady")
def test_workers_trials_and_money(search: Search) -> None:
    found = make_plan(search, replace(HAND, workers=4, price=2.5))
    trial = 2 * (10 + 3 * 8)
    assert found.prediction.mid == 3 * trial + 60
    hours = (3 * trial + 60) * 4 / HOUR
    assert f"it costs about {hours * 2.5:,.2f}: {hours:.2f} worker hours x 2.5" in describe_plan(found)
    assert "each worker has a device of its own, as fast as this one" in found.assumed
    changes = {one.change: one.mid * HOUR for one in found.what_ifs}
    assert changes["8 workers"] == pytest.approx(2 * trial + 60)
    assert changes["6 trials"] == pytest.approx(2 * trial + 60)
    # one split of 32 rows and 8: as the trial's parts grow with their rows
    split = 10 + 3 * (3 * 1.0 * 0.8 / 0.5 + 5 * 0.2 / 0.5)
    assert changes["a single split"] == pytest.approx(3 * split + 60)
    assert changes["with the pruner asha"] < found.prediction.mid


def test_what_is_not_given_by_hand_is_rough_and_said_to_be(search: Search) -> None:
    found = make_plan(search, PlanConfig(step_ms=1000.0))
    [draw] = found.calibration.draws
    assert draw.cost.validation == pytest.approx(1.0)  # as many rows as are trained on, for a third of their time
    assert draw.cost.fold == 1.0
    assert found.calibration.start == pytest.approx(7.0 * 1.15)  # this process's start, and its end
    assert "steps take what was given by hand; what was not given is rough" in found.assumed


def test_a_plan_that_is_late_says_so_and_what_would_be_in_time(search: Search) -> None:
    found = make_plan(search, replace(HAND, deadline=0.15))
    assert found.late
    assert found.prediction.mid / HOUR == pytest.approx(0.243, rel=0.1)
    assert all(fix.high <= 0.15 for fix in found.fixes)
    assert found.fixes[0].setting == "the command 2 times"  # costs no quality
    [trials] = [int(fix.setting.split()[1]) for fix in found.fixes if fix.setting.startswith("--hpo.n_trials")]
    assert 4 <= trials < 12
    more = make_plan(with_hpo(search, n_trials=trials + 1), replace(HAND, deadline=0.15))
    assert more.late  # as many as there is time for, and no more
    text = describe_plan(found)
    assert "!! TOO LONG: there are 9.0 min, and it may take 15." in text
    assert text.index("the command 2 times") < text.index(f"--hpo.n_trials {trials}")


def test_a_plan_in_time_and_one_that_nothing_helps(search: Search) -> None:
    assert "it is in time: there are 2.00 h" in describe_plan(make_plan(search, replace(HAND, deadline=2.0)))
    hopeless = make_plan(search, replace(HAND, deadline=0.01))
    assert hopeless.fixes == ()
    assert "!! No number of trials or workers would be in time" in describe_plan(hopeless)


@pytest.mark.usefixtures("steady")
def test_the_flags_of_a_change_are_ones_that_hpo_takes(search: Search) -> None:
    tuned = with_hpo(search, pruner=PrunerConfig("asha", reduction_factor=2, paused_gb=1.0))
    [without] = [one for one in make_plan(tuned, HAND).what_ifs if one.change == "without pruning"]
    assert without.setting == "--hpo.pruner.name none --hpo.pruner.reduction_factor 4 --hpo.pruner.paused_gb null"
    # of one epoch on one split there is a single report
    study = Study(60, Steps(2, 1), PrunerConfig(), learns=False)
    split = Changes(study, Priced([COST]), KNOWN, 0.2).single_split()
    assert split.setting == "--data.split.folds 1 --hpo.pruner.name none"
    costly = with_hpo(search, pruner=NONE, cost="train_seconds")
    assert not [one for one in make_plan(costly, HAND).what_ifs if "asha" in one.setting]


@pytest.mark.usefixtures("steady")
def test_where_no_single_change_is_enough_two_at_once_may_be(search: Search) -> None:
    # one trial of 2 folds takes 68 s and one of a single split 10 + 3 x (4.8 + 2) = 30.4 s, after 60 s of the start
    found = make_plan(search, replace(HAND, deadline=(60 + 2.5 * 30.4) / HOUR, workers=MOST_WORKERS))
    [fix] = make_plan(search, replace(HAND, deadline=(60 + 1.5 * 30.4) / HOUR)).fixes
    assert fix.setting == "--data.split.folds 1 --hpo.n_trials 1"
    assert fix.mid * HOUR == pytest.approx(90.4)
    assert found.prediction.mid == 60 + 68


def test_a_pruner_that_can_never_fire_is_named(search: Search) -> None:
    planted = with_hpo(search, pruner=PrunerConfig("wilcoxon"))
    found = make_plan(planted, HAND)
    assert "'wilcoxon' could never prune with 12 trials of 6 steps" in found.problems[0]
    assert found.prediction.share == (1.0, 1.0, 1.0)
    assert describe_plan(found).startswith("!! hpo.pruner: 'wilcoxon' could never prune")


def test_what_makes_no_sense_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hpo = StudyConfig(12, SPACE, pruner=PrunerConfig("hyperband", patience=2), timeout=10800.0)
    found, pruner = judge_search(hpo, Steps(3, 6))
    assert pruner == hpo.pruner
    assert [
        "never pruned, however bad it is" in found[0],
        "stops each call of the study after 10800 s" in found[1],
    ] == [True, True]
    cost = TrialCost(0.0, 0.0, 0.0, 1.0, 1.0)
    shaky = Calibration((Draw({}, {}, cost, 1.0, 0.1, 0.3),), missing=2, took=9.0)
    texts = " ".join(doubts(shaky))
    assert "2 of 3 points of the space ran out of memory" in texts
    assert "one point of the space only" in texts
    assert "+-30%" in texts


def test_a_busy_machine_is_seen_by_what_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
    own = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (11.0, 0.0, 0.0, 0.0, 0.0)] * 3)
    times = iter([100.0, 110.0] * 3)
    monkeypatch.setattr(plan_doubts, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(plan_doubts.time, "monotonic", lambda: next(times))

    def problems(user: float, steal: float) -> list[str]:
        (tmp_path / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1\n")
        others = Others()
        (tmp_path / "stat").write_text(f"cpu  {user * ticks:.0f} 0 0 99 99 0 0 {steal * ticks:.0f} 0 0\ncpu0 1\n")
        return others.problems()

    assert f"{cores:.1f} of its {cores} cores" in problems(10 + 10 * cores, 0)[0]
    assert problems(10, 0) == []
    assert "this machine is busy" in problems(10, 10 * cores)[0]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"workers": 0}, {"trials": 0}, {"seconds": -1.0}, {"survival": 0.0}, {"survival": 1.5}, {"deadline": 0.0}),
        *({"price": -1.0}, {"compile_gain": 1.0}, {"step_ms": 0.0}, {"start_s": float("nan")}),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected a number"):
        PlanConfig(**wrong)


def test_a_plan_survives_json(search: Search) -> None:
    found = make_plan(with_hpo(search, pruner=PrunerConfig()), HAND)
    plain = json.loads(json.dumps(found.as_dict()))
    assert load_calibration(plain["calibration"]) == found.calibration
    assert plain["prediction"]["mid"] == found.prediction.mid
    assert plain["planned"]["steps"] == {"folds": 2, "epochs": 3, "per_epoch": 1}


def test_recorded_curves_and_a_stated_share_are_used(search: Search) -> None:
    curves = str(CONFIGS.parent / "docs" / "benchmarks" / "curves" / "sick.json")
    halving = with_hpo(search, pruner=PrunerConfig())
    recorded = make_plan(halving, replace(HAND, curves=curves))
    assert "learning curves are like those recorded of sick" in recorded.assumed
    assert recorded.as_dict()["curves"] == "sick"
    stated = make_plan(halving, replace(HAND, survival=0.25))
    assert stated.prediction.share[1] == pytest.approx(0.25)
    assert "the pruner leaves 25% of the full cost, as given" in stated.assumed


# ---------------------------------------------------------------------- levels


COST = TrialCost(visit=0.0, fold=10.0, epoch=0.0, train=80.0, validation=20.0, epochs=2)
KNOWN = Calibration((Draw({}, {}, COST, 0.8, 0.01, 0.0),), steps=100, read=5.0, took=60.0)
STUDY = Study(36, Steps(2, 2), PrunerConfig(), learns=False, refit=False)
COMPUTE, REST, RELOAD = 36 * 4 * 100 / HOUR, 36 * 2 * 10 / HOUR, 36 * 2 * 5 / HOUR


def table(study: Study = STUDY, looks: Looks | None = None, **changes: Any) -> dict[str, Level]:
    priced = Priced([COST])
    prediction = predict(study, priced, KNOWN)
    settings = {"variants": {PLAIN: 4.0, PADDED: 2.0}, "compile": CompileConfig("never"), "gain": 0.15, **changes}
    found = levels(study, priced, KNOWN, prediction, looks=looks or Looks("cpu", "bf16-mixed", "packed"), **settings)
    return {level.name: level for level in found}


def test_each_level_follows_from_the_one_before() -> None:
    found = table()
    hours = [level.hours for level in found.values()]
    # fp32 and padded takes 4 times as long, bf16 and padded twice; then the model is no longer read for each fold
    assert hours[0] == pytest.approx(4 * COMPUTE + REST + RELOAD)
    assert hours[1] == hours[2] == pytest.approx(2 * COMPUTE + REST + RELOAD)
    assert hours[3] == hours[4] == hours[5] == hours[6] == pytest.approx(COMPUTE + REST + RELOAD)
    assert found["+warm start"].hours == pytest.approx(COMPUTE + REST)
    assert found["+pruning"].hours < 0.7 * (COMPUTE + REST)
    assert found["none"].how == f"36 trials x {(4 * COMPUTE + REST + RELOAD) * 60 / 36:.1f} min"
    assert found["+bf16"].how == "steps x 0.500"
    assert (found["+bf16"].basis, found["+packing"].how) == ("measured", "steps x 0.500")
    assert found["+TF32"].basis == "impossible"
    assert found["+warm start"].how == "36 x 2 times not reading the model: 6.0 min less"


def test_what_was_not_measured_is_said_to_be_predicted() -> None:
    found = table(variants={})
    assert found["+bf16"].basis == "predicted"
    assert "as is claimed" in found["+bf16"].how
    assert found["none"].hours == pytest.approx(2 * COMPUTE + REST + RELOAD)
    assert found["+packing"].basis == "in effect"
    assert table(looks=Looks("cpu", "32-true", "packed"), variants={})["none"].basis == "not known"
    elsewhere = levels(
        STUDY, Priced([COST]), KNOWN, predict(STUDY, Priced([COST]), KNOWN), {}, None, CompileConfig(), 0.1
    )
    assert [level.basis for level in elsewhere[:4]] == ["not known"] * 4


def test_max_autotune_is_in_effect_only_where_layers_are_compiled() -> None:
    tuned = CompileConfig("auto", mode="max-autotune")
    assert (table(compile=tuned)["+max-autotune"].basis, table(compile=tuned)["+max-autotune"].how) == (
        "off",
        "with compile",
    )
    assert table(compile=replace(tuned, policy="always"))["+max-autotune"].basis == "in effect"


def test_steps_are_those_of_all_draws_and_epochs_those_that_are_drawn() -> None:
    small, large = Draw({}, {}, replace(COST, train=60.0), 0.3, 0.01, 0.0), KNOWN.draws[0]
    known = replace(KNOWN, draws=(small, large), steps=150)
    assert known.step_s == 140 / 2 / 150
    priced = Priced([replace(COST, epochs=1), COST])
    # 36 trials, 2 folds, on average 1.5 epochs of 80 s, of which a quarter is left
    assert training_s(STUDY, priced, 0.25) == 36 * 2 * 1.5 * 80 / 4


def test_what_is_off_brings_nothing_and_names_its_switch() -> None:
    found = table(replace(STUDY, pruner=NONE), Looks("cpu", "32-true", "padded"), variants={})
    assert "off: trainer.precision is 32-true" in found["+bf16"].how
    assert "off: attention is padded" in found["+packing"].how
    assert "compile.policy is never" in found["+compile"].how
    assert found["+pruning"].how == "off: hpo.pruner.name is none"
    assert {found[name].hours for name in ("none", "+bf16", "+packing", "+compile")} == {found["none"].hours}


def test_workers_are_a_level() -> None:
    alone, shared = table(), table(replace(STUDY, workers=4))
    assert shared["+workers"].hours == alone["+warm start"].hours / 4
    assert "+workers" not in alone


def test_compiling_is_tried_only_where_the_run_itself_would_try() -> None:
    auto = CompileConfig("auto", time_limit=50.0)
    quick = replace(COST, train=0.1)
    short = trying_s(
        replace(STUDY, trials=1),
        Priced([quick]),
        replace(KNOWN, draws=(replace(KNOWN.draws[0], cost=quick),)),
        1.0,
        auto,
    )
    assert short[0] == 0.0
    assert "could be saved, compiling takes at least" in short[1]
    assert trying_s(replace(STUDY, trials=2000), Priced([COST]), KNOWN, 1.0, auto)[0] == 50.0
    assert trying_s(replace(STUDY, trials=2000), Priced([COST]), KNOWN, 1.0, CompileConfig("always"))[0] == 0.0
    assert "would make it" in table(replace(STUDY, trials=2000), compile=auto)["+compile"].how


def test_break_even_of_compiling() -> None:
    prediction = predict(replace(STUDY, pruner=NONE), Priced([COST]), KNOWN)
    first, shorter, faster = describe_compile(
        replace(STUDY, pruner=NONE), Priced([COST]), KNOWN, prediction, 60.0, 0.15
    )
    # 36 trials x 2 folds x 2 epochs x 100 steps of 0.8 s
    assert first.startswith("each worker trains 14,400 steps of 800 ms = 3.20 h; 60 s of compiling pay")
    assert "get 0.5% shorter" in first
    assert "paid after 500 steps, 1.2 whole trials" in shorter  # 60 s / (0.15 x 0.8 s)
    assert "net: 28.8 min - 60 s = 27.8 min" in shorter
    assert "paid after 575 steps" in faster
    assert describe_compile(STUDY, Priced([COST]), KNOWN, prediction, 1e9, 0.15)[0].endswith(
        "1e+09 s of compiling can't pay"
    )


def test_the_table_lines_up() -> None:
    rows = [Level("none", 800.0, "2,000 trials x 24 min", "measured"), Level("+bf16", 0.5, "steps x 0.5", "predicted")]
    assert table_of_levels(rows) == [
        "none      800 h  measured    2,000 trials x 24 min",
        "+bf16  30.0 min  predicted   steps x 0.5",
    ]


# ---------------------------------------------------------------------- on the command line


@pytest.fixture
def program(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The program, in a folder and with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    return run


def test_the_quickstart_is_planned_by_trying(program: Callable[..., Any], tmp_path: Path) -> None:
    assert program("sample", "runs/sample")[0] == 0
    config = str(CONFIGS / "quickstart.yaml")
    status, out, err = program("plan", "-c", config, "--seconds", "4", "--json", "plan.json", "--deadline", "0.0001")
    assert status == 0, err
    assert re.search(r"quickstart: 24 trials, 3 folds, at most 3 epochs each, pruner asha, 1 worker", out)
    assert re.search(r"it takes about \d+:\d\d:\d\d \(\d+:\d\d:\d\d to \d+:\d\d:\d\d in eight studies of ten\)", out)
    assert "!! TOO LONG" in out
    assert "a format of Nvidia's GPUs; this is cpu" in out
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert plain["schema_version"] == 1
    known = load_calibration(plain["calibration"])
    assert known.steps > 1
    assert known.took > 0
    assert min(draw.cost.train for draw in known.draws) > 0
    assert known.finish > 0  # with the refit and the test file
    # nothing is left behind, and no study was begun
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sample"]
    status, out, err = program("plan", "-c", config, "--step_ms", "20", "--trials", "2000", "--workers", "4")
    assert status == 0, err
    assert "quickstart: 2,000 trials" in out
    assert "+workers" in out


def test_a_wrong_option_ends_with_a_message(program: Callable[..., Any]) -> None:
    assert program("sample", "runs/sample")[0] == 0
    status, _, err = program("plan", "-c", str(CONFIGS / "quickstart.yaml"), "--survival", "2")
    assert status == 2
    assert "survival" in err


def test_help_names_the_options(program: Callable[..., Any]) -> None:
    status, out, _ = program("plan", "--help")
    assert status == 0
    for name in ("--deadline", "--step_ms", "--survival", "--workers", "--curves", "--price"):
        assert name in out
