"""A calibration on trials whose parts have known seconds: a clock that moves only where the test moves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_bge.advisor.plan import calibrate as calibrate_module
from lightning_bge.advisor.plan import pace as measure
from lightning_bge.advisor.plan import trial_bench as bench_module
from lightning_bge.advisor.plan.calibrate import Measured, calibrate
from lightning_bge.advisor.plan.pace import Step
from lightning_bge.advisor.plan.trial_bench import Bench, Sizes, Visit
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.study import quiet_optuna
from lightning_bge.hpo.trial.objective import TrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from tests.helpers.small_search import SPACE, make, write_files

quiet_optuna()
BUILD, START, STEP, FIRST, VALIDATION, EPOCH, END = 1.0, 2.0, 0.01, 5.0, 0.001, 3.0, 4.0
READ, RESET = 30.0, 0.5


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Moves the clock on: so many seconds a token in training and validation, and for all that surrounds them."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.fresh = clock, True

    def on_fit_start(self, *_: Any) -> None:
        self.fresh = True

    def on_train_start(self, *_: Any) -> None:
        self.clock.now += START

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.now += STEP * batch.tokens + FIRST * self.fresh
        self.fresh = False

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.clock.now += VALIDATION * batch.tokens

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.clock.now += EPOCH

    def on_fit_end(self, *_: Any) -> None:
        self.clock.now += END


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (measure, bench_module, calibrate_module):
        monkeypatch.setattr(module, "_clock", found)
    return found


class SlowToRead(EncoderCache):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def load(self, *args: Any, **options: Any) -> Any:
        loads = self.loads
        net = super().load(*args, **options)
        self.clock.now += RESET + READ * (self.loads > loads)
        return net


def bench_of(tmp_path: Path, clock: Clock, pruner: str = "asha", **changes: Any) -> tuple[Bench, Any]:
    build = make(write_files(tmp_path), (Spend(clock),)).build

    def slow(params: dict[str, Any]) -> TrialSetup:
        clock.now += BUILD
        setup = build(params)
        setup.datamodule.batch_size = 4  # 20 rows of each fold: five steps
        return replace(setup, **changes)

    hpo = StudyConfig(12, SPACE, pruner=PrunerConfig(pruner), sampler="random")  # type: ignore[arg-type]
    folder = tmp_path / "calibration"
    folder.mkdir()
    return Bench(slow, hpo, "best", CompileConfig("never"), SlowToRead(clock), folder), slow


@pytest.mark.parametrize("pruner", ["asha", "none"])
def test_each_part_is_taken_to_its_real_size(tmp_path: Path, clock: Clock, pruner: str) -> None:
    bench, build = bench_of(tmp_path, clock, pruner)
    space = parse_space(SPACE)
    sizes = Sizes.of(build({"lr": 1e-3, "dropout": 0.1}).datamodule)
    clock.now = 0.0
    found = calibrate(bench, draw_parameter_sets(space, [], 20), space, epochs=2, seconds=1000.0)
    assert len(found.draws) >= 2
    for draw in found.draws:
        cost = draw.cost
        assert cost.train == pytest.approx(STEP * sizes.train)
        assert cost.validation == pytest.approx(VALIDATION * sizes.validation)
        assert cost.epoch == pytest.approx(EPOCH)
        assert cost.fold == pytest.approx(BUILD + RESET + START + FIRST + END)
        assert (cost.visit, cost.resume, cost.epochs) == (0.0, 0.0, 2)
        assert draw.error == pytest.approx(0.0, abs=1e-9)
    # the model is read once a study, and once more for the refit, which is a part of its end
    assert found.first == pytest.approx(READ)
    assert found.read == pytest.approx(READ)
    assert found.refit_epoch == pytest.approx(STEP * sizes.all)
    assert found.steps == sizes.steps == 5
    # two builds at the end, and one fold, whose model is read by the plain loader
    assert found.finish == pytest.approx(2 * BUILD + START + FIRST + END, abs=1e-6)


def test_sizes_are_means_over_the_folds(tmp_path: Path, clock: Clock) -> None:
    _, build = bench_of(tmp_path, clock)
    data = build({"lr": 1e-3, "dropout": 0.1}).datamodule
    lengths = data.lengths("train")
    assert Sizes.of(data) == Sizes(lengths.sum() / 2, lengths.sum() / 2, lengths.sum(), 5)


def test_it_stops_when_its_time_is_over(tmp_path: Path, clock: Clock) -> None:
    bench, _ = bench_of(tmp_path, clock)
    space = parse_space(SPACE)
    found = calibrate(bench, draw_parameter_sets(space, [], 20), space, 2, seconds=1.0)
    assert len(found.draws) == 1  # one is made whatever it takes


class Fails(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise MemoryError("can't allocate memory")


def failing(build: Any, rates: tuple[float, ...]) -> Any:
    """Trials with these rates of dropout run out of memory."""

    def some(params: dict[str, Any]) -> TrialSetup:
        setup = build(params)
        if params["dropout"] not in rates:
            return setup
        inner = setup.make_trainer
        return replace(setup, make_trainer=lambda callbacks, **more: inner(callbacks=[*callbacks, Fails()], **more))

    return some


def test_points_that_do_not_fit_into_memory_are_counted(tmp_path: Path, clock: Clock) -> None:
    bench, build = bench_of(tmp_path, clock)
    bench.build = failing(build, (0.0,))
    points = [{"lr": 1e-3, "dropout": rate} for rate in (0.0, 0.1, 0.3)]
    found = calibrate(bench, points, parse_space(SPACE), 2, 1000.0)
    assert (len(found.draws), found.missing) == (2, 1)


def test_where_no_point_fits_there_is_no_plan(tmp_path: Path, clock: Clock) -> None:
    bench, build = bench_of(tmp_path, clock)
    bench.build = failing(build, (0.1,))
    with pytest.raises(ConfigError, match="none of 1 points of the space fits into memory"):
        calibrate(bench, [{"lr": 1e-3, "dropout": 0.1}], parse_space(SPACE), 2, 1000.0)


def test_an_epoch_of_one_step_can_be_measured_too(tmp_path: Path, clock: Clock) -> None:
    bench, build = bench_of(tmp_path, clock)

    def large(params: dict[str, Any]) -> TrialSetup:
        setup = build(params)
        setup.datamodule.batch_size = 100
        return setup

    bench.build = large
    found = calibrate(bench, [{"lr": 1e-3, "dropout": 0.1}], parse_space(SPACE), 2, 1000.0)
    assert found.steps == 1
    assert found.draws[0].cost.train == pytest.approx(
        STEP * Sizes.of(large({"lr": 1e-3, "dropout": 0.1}).datamodule).train
    )


def visit(*seconds: float) -> Visit:
    """Of steps of 10 tokens each, the first one a second longer."""
    steps = tuple(Step(s + (number == 0), 0.0, 2, 10, 1) for number, s in enumerate(seconds))
    return Visit(10.0, 0.0, False, 0.0, 0.0, 5.0, 0.0, steps, (Step(1.0, 0.0, 2, 10, 1),), 1)


def test_what_batches_take_that_are_new_to_a_process_counts_once() -> None:
    """A trial trains 2 folds x 3 epochs of 100 tokens; its steps take 3 s, and 2 s once their batches are known."""
    draw = Measured({}, Sizes(100.0, 50.0, 150.0, 10), (visit(3.0, 3.0, 3.0),), (visit(2.0, 2.0, 2.0),), folds=2)
    assert draw.rate == pytest.approx(0.2)
    assert draw.new_batches(epochs=3) == pytest.approx(0.1 * 100 * 3 * 2)
    assert Measured({}, draw.sizes, draw.first).rate == pytest.approx(0.3)
    assert Measured({}, draw.sizes, draw.first).new_batches(epochs=3) == 0
