"""The time left, on searches whose end is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.eta import Eta, SearchOptions, _n_best, estimate_end
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import replay_pruned
from lightning_bge.hpo.forecast.trial_times import TrialTimes
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner
from lightning_bge.hpo.pruning.halving import Halving, rung_steps
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trials import PARAMETER_SET, PAUSED_AT, REPORTS_BEFORE, RESUMES, parameter_set_of
from tests.helpers.paths import CURVES

START = datetime(2026, 1, 1)
OUTSIDE, GAP = 0.3, 0.05  # seconds of a trial outside of its reports, and between trials


class Machine:
    """Makes trials as one worker of a study leaves them behind."""

    def __init__(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.now = START

    def ran(self, curve: Curve, start: int, end: int, complete: bool, **attributes: Any) -> FrozenTrial:
        reports = [
            [step + 1, curve.values[step], curve.seconds[step] - curve.validation[step], curve.validation[step], 0, 0]
            for step in range(end)
        ]
        trial = create_trial(
            state=TrialState.COMPLETE if complete else TrialState.PRUNED,
            value=curve.value if complete else curve.values[end - 1],
            intermediate_values={step + 1: curve.values[step] for step in range(end)},
            user_attrs={"worker": {"id": "h-1", "host": "h", "pid": 1}, "curve": [reports], **attributes},
        )
        trial.number, trial.datetime_start = len(self.trials), self.now
        self.now += timedelta(seconds=OUTSIDE + sum(curve.seconds[start:end]))
        trial.datetime_complete = self.now
        self.now += timedelta(seconds=GAP)
        self.trials.append(trial)
        return trial


def searched(recording: Recording, order: Sequence[int], rungs: Sequence[int], factor: int) -> list[FrozenTrial]:
    """The trials of a whole search with asha on one worker."""
    machine, halving, latest, started = Machine(), Halving(len(rungs), factor), dict[int, FrozenTrial](), 0
    while True:
        number, stage = halving.next_resumed(nothing_else=started == len(order)), 0
        if number is not None:
            stage = halving.resume(number) + 1
        elif started < len(order):
            number, started = started, started + 1
        else:
            return machine.trials
        curve, before = recording.trials[order[number]], latest.get(number)
        paused = {}
        for rung in range(stage, len(rungs)):
            if curve.value is None and len(curve.values) <= rungs[rung]:
                break
            if halving.arrive(number, rung, recording.sign * curve.values[rungs[rung] - 1]):
                paused = {PAUSED_AT: rungs[rung]}
                break
        complete = not paused and curve.value is not None
        if complete:
            halving.complete()
        start = 0 if before is None else len(before.intermediate_values)
        resumed = {}
        if before is not None:
            resumed = {RESUMES: before.number, PARAMETER_SET: parameter_set_of(before), REPORTS_BEFORE: start}
        end = paused.get(PAUSED_AT, len(curve.values))
        latest[number] = machine.ran(curve, start, end, complete, **resumed, **paused)


def recorded(name: str) -> Recording:
    return Recording.load(CURVES / f"{name}.json").coarser(1)


def orders(recording: Recording, trials: int, count: int) -> Iterator[np.ndarray]:
    """The first one recorded is left out: what a process does once is in its seconds."""
    for seed in range(count):
        yield np.random.default_rng(seed).permutation(np.arange(1, len(recording.trials)))[:trials]


def judge(found: Sequence[tuple[Eta, float]]) -> tuple[float, float]:
    """Mean of mid over truth, and the share of truths within the range."""
    inside = np.mean([eta.low <= truth <= eta.high for eta, truth in found])
    return float(np.mean([eta.mid / truth for eta, truth in found])), float(inside)


@pytest.mark.parametrize("trials", [12, 39])
def test_after_a_third_of_a_recorded_search_the_rest_is_known(trials: int) -> None:
    found = []
    for name in ("trecqa", "sick", "sample"):
        recording = recorded(name)
        steps = Steps(recording.folds, recording.epochs)
        for order in orders(recording, trials, 20):
            everything = searched(recording, order, rung_steps(steps.total, 1, 4), 4)
            seen = everything[: len(everything) // 3]
            now, end = seen[-1].datetime_complete, everything[-1].datetime_complete
            assert now is not None
            assert end is not None
            eta = estimate_end(
                seen, SearchOptions(PrunerConfig(), trials, steps, recording.direction, "random"), 1, now
            )
            assert eta is not None
            found.append((eta, (end - now).total_seconds()))
    mean, inside = judge(found)
    assert 0.9 < mean < 1.1
    assert 0.65 <= inside <= 0.92  # 0.8 in the long run; 60 searches


@pytest.mark.parametrize("pruner", [PrunerConfig("median"), PrunerConfig("percentile"), PrunerConfig("none")])
def test_with_other_pruners_too(pruner: PrunerConfig) -> None:
    recording = recorded("sample")
    steps, trials, found = Steps(recording.folds, recording.epochs), 40, []
    for order in orders(recording, trials, 6):
        run = replay_pruned(recording, build_pruner(pruner, trials, steps), order)
        machine = Machine()
        for place, reports in zip(order, run.steps, strict=True):
            curve = recording.trials[place]
            machine.ran(curve, 0, reports, reports == steps.total and curve.value is not None)
        seen = machine.trials[: trials // 3]
        now = seen[-1].datetime_complete
        assert now is not None
        eta = estimate_end(seen, SearchOptions(pruner, trials, steps), 1, now)
        assert eta is not None
        found.append((eta, (machine.now - now).total_seconds() - GAP))
    mean, inside = judge(found)
    assert 0.85 < mean < 1.15
    assert inside >= 0.5


def made(count: int, seconds: float = 10.0, workers: int = 1, total: int = 4) -> list[FrozenTrial]:
    """Complete trials of the same length, on several workers that began at the same time."""
    trials = []
    for number in range(count):
        trial = create_trial(value=0.5, intermediate_values={step: 0.5 for step in range(1, total + 1)})
        trial.number = number
        trial.datetime_start = START + timedelta(seconds=seconds * (number // workers))
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=seconds)
        trials.append(trial)
    return trials


def test_without_a_pruner_it_is_the_mean_times_what_is_left() -> None:
    trials, search = made(8), SearchOptions(PrunerConfig("none"), 20, Steps(2, 2))
    now = START + timedelta(seconds=80)
    eta = estimate_end(trials, search, 1, now)
    assert eta is not None
    assert eta.mid == pytest.approx(120, rel=0.03)
    assert 100 < eta.low < eta.mid < eta.high < 140
    several = estimate_end(trials, search, 4, now)
    assert several is not None
    assert several.mid == pytest.approx(30, rel=0.03)
    # of the best five ten runs with two other seeds, of which seven have ended; and the refit
    further = estimate_end(trials, replace(search, n_seeds=2, refit=True), 1, now, n_replicated=7)
    assert further is not None
    assert further.mid == pytest.approx(158, rel=0.03)


def test_few_trials_of_a_long_search_have_seed_replicates() -> None:
    # one in four is resumed at each of five rungs: 2,000 / 4 ** 5
    assert _n_best((), SearchOptions(PrunerConfig(), 2000, Steps(5, 100))) == 2
    assert _n_best((), SearchOptions(PrunerConfig(), 30, Steps(5, 10))) == 1
    assert _n_best(made(8), SearchOptions(PrunerConfig("none"), 2000, Steps(2, 2))) == 5
    assert _n_best(made(3), SearchOptions(PrunerConfig("none"), 3, Steps(2, 2))) == 3


def test_what_runs_is_counted_by_what_it_has_still_to_do() -> None:
    trials = made(8, workers=2)
    running = create_trial(state=TrialState.RUNNING)
    running.number, running.datetime_start = 8, START + timedelta(seconds=32)
    eta = estimate_end(
        [*trials, running], SearchOptions(PrunerConfig("none"), 10, Steps(2, 2)), 2, START + timedelta(seconds=40)
    )
    assert eta is not None
    assert eta.mid == pytest.approx(10, rel=0.05)  # the other one begins now; this one needs 2 s more
    alone = estimate_end(
        [*trials, running], SearchOptions(PrunerConfig("none"), 9, Steps(2, 2)), 2, START + timedelta(seconds=40)
    )
    assert alone is not None
    assert 0.5 < alone.low < 2 < alone.high < 4


def test_a_search_that_was_stopped_and_continued_counts_no_pause() -> None:
    trials = made(6)
    for trial in trials[3:]:
        for name in ("datetime_start", "datetime_complete"):
            setattr(trial, name, getattr(trial, name) + timedelta(days=3))
    eta = estimate_end(
        trials, SearchOptions(PrunerConfig("none"), 12, Steps(2, 2)), 1, START + timedelta(days=3, seconds=60)
    )
    assert eta is not None
    assert eta.mid == pytest.approx(60, rel=0.05)


def test_nothing_is_estimated_before_a_trial_has_ended() -> None:
    running = create_trial(state=TrialState.RUNNING)
    running.datetime_start = START
    failed = create_trial(state=TrialState.FAIL)
    empty = create_trial(state=TrialState.PRUNED, value=None)
    for trials in ([], [running], [failed, empty]):
        assert estimate_end(trials, SearchOptions(PrunerConfig(), 12, Steps(2, 2)), 1, START) is None


def test_a_finished_search_has_nothing_left() -> None:
    for pruner in (PrunerConfig("none"), PrunerConfig()):
        assert estimate_end(made(5), SearchOptions(pruner, 5, Steps(2, 2)), 1, START) == Eta(0.0, 0.0, 0.0)


def test_the_best_paused_one_still_runs_to_its_end() -> None:
    """Three trials at the rung: none is in the top quarter, so that the best is resumed when all have started."""
    recording = Recording(
        "r",
        "minimize",
        1,
        5,
        1,
        {},
        tuple(Curve(number, {}, float(number), (float(number),) * 5, (2.0,) * 5, (1.0,) * 5) for number in range(3)),
    )
    trials = searched(recording, range(3), [1], 4)
    assert [len(trial.intermediate_values) for trial in trials] == [1, 1, 1, 5]
    search = SearchOptions(PrunerConfig(), 3, Steps(1, 5), "minimize")
    eta = estimate_end(trials[:3], search, 1, trials[2].datetime_complete or START)
    assert eta is not None
    assert eta.mid == pytest.approx(8 + OUTSIDE + GAP, rel=0.05)


def test_progress_prints_the_time_left_and_estimates_it_seldom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"model.optimizer.lr": {"low": 0.0, "high": 1.0}}
    config = StudyConfig(n_trials=9, space=space, pruner=PrunerConfig("none"), refit=False, baseline=False)
    study = open_study(study_storage(tmp_path, config), config, "maximize", Steps(2, 2), {})
    assert study.user_attrs["steps"] == {"folds": 2, "epochs": 2, "per_epoch": 1}
    asked = []

    def fake(trials: Sequence[FrozenTrial], search: SearchOptions, workers: int, now: datetime) -> Eta:
        asked.append((len(trials), search, workers))
        return Eta(3900.0, 4800.0, 6000.0)

    monkeypatch.setattr("lightning_bge.hpo.progress.estimate_end", fake)
    progress = Progress(config, "f1", 4)
    for trial in made(2):
        study.add_trial(trial)
    progress(study, study.trials[0])
    assert capsys.readouterr().out.rstrip().endswith("about 1:20:00 left (1:05:00 to 1:40:00)")
    assert asked == [(2, SearchOptions(PrunerConfig("none"), 9, Steps(2, 2)), 1)]
    progress.took = 1e6  # as if that had taken long
    progress(study, study.trials[1])
    assert len(asked) == 1
    assert "about 1:20:00 left" in capsys.readouterr().out


def test_before_the_first_report_no_time_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(create_trial(state=TrialState.PRUNED, value=None))
    Progress(StudyConfig(n_trials=9), "f1", 4)(study, study.trials[0])
    assert "left" not in capsys.readouterr().out


def first_trials_of_the_sample() -> tuple[list[FrozenTrial], Steps, datetime]:
    """20 of 58 trials of a recorded search, what a trial reports, and when the last of the 20 has ended."""
    recording = recorded("sample")
    steps = Steps(recording.folds, recording.epochs)
    seen = searched(recording, range(1, 59), rung_steps(steps.total, 1, 4), 4)[:20]
    now = seen[-1].datetime_complete
    assert now is not None
    return seen, steps, now


def test_the_configured_options_take_as_long_as_a_trial_that_is_not_pruned() -> None:
    seen, steps, now = first_trials_of_the_sample()
    search = SearchOptions(PrunerConfig(), 58, steps)
    without, with_it = (estimate_end(seen, replace(search, baseline=one), 1, now) for one in (False, True))
    times = TrialTimes.read(seen, steps)
    assert without is not None
    assert with_it is not None
    assert times is not None
    assert with_it.mid - without.mid == pytest.approx(times.seconds(0, steps.total))


def test_several_workers_share_what_is_left() -> None:
    seen, steps, now = first_trials_of_the_sample()
    alone, shared = (estimate_end(seen, SearchOptions(PrunerConfig(), 58, steps), workers, now) for workers in (1, 4))
    assert alone is not None
    assert shared is not None
    assert 0.25 * alone.mid < shared.mid < 0.5 * alone.mid  # at the end some have nothing to do


def test_better_parameter_sets_are_resumed_more_often() -> None:
    seen, steps, now = first_trials_of_the_sample()
    learned, drawn = (
        estimate_end(seen, SearchOptions(PrunerConfig(), 58, steps, sampler=sampler), 1, now)
        for sampler in ("tpe", "random")
    )
    assert learned is not None
    assert drawn is not None
    assert learned.mid > drawn.mid
