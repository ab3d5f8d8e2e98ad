"""Seed replicates of the best trials: the right winner, nothing run twice, nothing lost."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.seed_replicates import (
    ReplicatedTrial,
    SeedReplicates,
    _open,
    describe_seed_replicates,
    run_seed_replicates,
)
from lightning_bge.hpo.space.search_space import parse_space, suggest
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import _start_time, abandon, mark_alive, sweep, this_worker
from lightning_bge.hpo.study import open_study, run_study
from lightning_bge.hpo.trial.objective import TrialFiles

SPACE = {"lr": {"low": 0.0, "high": 1.0}}
Value = Callable[[optuna.Trial, int], float]


def config(trials: int = 8, **changes: Any) -> StudyConfig:
    return StudyConfig(
        **{"n_trials": trials, "space": SPACE, "pruner": PrunerConfig(name="none"), "seed_replicates": 2, **changes}
    )


@dataclass(frozen=True)
class Search:
    """An objective without training: `lr` in the search, and what the test says with another seed."""

    files: TrialFiles
    value: Value = lambda trial, seed: trial.params["lr"]
    cost: str | None = None
    n_trials: int = 0
    steps: Steps = Steps(2, 2)  # noqa: RUF009 - frozen

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        mark_alive(trial)
        params = suggest(trial, parse_space(SPACE))
        if "seed" in trial.user_attrs:
            assert self.files.out_of_fold is None
            return self.value(trial, trial.user_attrs["seed"])
        folder = self.files.out_of_fold
        assert folder is not None
        folder.mkdir(exist_ok=True)
        (folder / f"{trial.number}.safetensors").touch()
        return params["lr"] if self.cost is None else (params["lr"], float(trial.number))


def search(folder: Path, settings: StudyConfig, direction: Any = "maximize") -> optuna.Study:
    study = open_study(folder, settings, direction, Steps(2, 2), {})
    run_study(study, Search(TrialFiles(folder / "oof"), cost=settings.cost), settings, "f1", 4)
    return study


def replicate(
    study: optuna.Study, folder: Path, settings: StudyConfig, value: Value, since: float = 1e9
) -> SeedReplicates:
    objective: Any = Search(TrialFiles(folder / "oof"), value)
    found = run_seed_replicates(study, objective, settings, metric="f1", seed=42, since=since)
    assert found is not None
    return found


def replicates_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=f"{folder.name}-seed-replicates", storage=open_storage(folder / "journal.log"))


def tasks(folder: Path, *states: TrialState) -> Counter[tuple[int, int]]:
    found = replicates_of(folder).get_trials(states=states or (TrialState.COMPLETE,))
    return Counter(
        (trial.user_attrs["replicate_of"], trial.user_attrs["seed"])
        for trial in found
        if "replicate_of" in trial.user_attrs
    )


def by_score(study: optuna.Study) -> list[int]:
    done = study.get_trials(states=(TrialState.COMPLETE,))
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return [trial.number for trial in sorted(done, key=lambda trial: sign * trial.values[0])]


def unlucky(first: int) -> Value:
    """With other seeds the search's best trial is far worse, all others are as before."""
    return lambda trial, seed: (
        trial.params["lr"] * (0.1 if trial.user_attrs["replicate_of"] == first else 1.0) + seed / 1e6
    )


@pytest.mark.parametrize("cost", [None, "train_seconds"])
def test_the_winner_has_the_best_mean_over_all_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cost: Any
) -> None:
    settings = config(cost=cost)
    study = search(tmp_path, settings)
    best = by_score(study)
    before = [(trial.number, trial.values) for trial in study.trials]
    capsys.readouterr()
    found = replicate(study, tmp_path, settings, unlucky(best[0]))
    assert found.seeds == (43, 44)
    assert [one.trial for one in found.trials] == best[:5]
    assert (found.before, found.winner) == (best[0], best[1])
    assert (found.missing, found.elsewhere) == (0, 0)
    first, second = found.trials[:2]
    own = [study.trials[number].values[0] for number in best[:2]]
    assert first.values == pytest.approx((own[0], own[0] / 10 + 43e-6, own[0] / 10 + 44e-6))
    assert second.mean == pytest.approx(own[1] + 29e-6)
    assert second.spread == pytest.approx(statistics.stdev(second.values))
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in best[:5] for seed in (43, 44)], 1)
    assert [(trial.number, trial.values) for trial in study.trials] == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith(f"[ 1/10] trial {best[0]} with seed 43 done: f1 0.")
    assert f"{own[0]:.4f} in the study" in lines[0]
    assert lines[-1].startswith(f"[10/10] trial {best[4]} with seed 44 done: f1 ")

    # a second call runs nothing
    assert replicate(study, tmp_path, settings, unlucky(best[0])) == found
    assert capsys.readouterr().out == ""
    assert tasks(tmp_path).total() == 10


def test_the_lower_mean_wins_where_that_is_better(tmp_path: Path) -> None:
    study = search(tmp_path, config(), "minimize")
    best = by_score(study)
    found = replicate(study, tmp_path, config(), lambda trial, _: float(trial.user_attrs["replicate_of"] != best[2]))
    assert [one.trial for one in found.trials] == best[:5]
    assert found.winner == best[2]


def test_more_trials_replicate_only_who_is_new_among_the_best(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    first = by_score(study)[:5]
    replicate(study, tmp_path, config(), unlucky(-1))
    study = search(tmp_path, config(30))
    best = by_score(study)[:5]
    new = set(best) - set(first)
    assert new
    found = replicate(study, tmp_path, config(30), unlucky(-1))
    assert [one.trial for one in found.trials] == best
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in {*first, *best} for seed in (43, 44)], 1)
    # one more seed, then fewer
    assert [
        len(one.values) for one in replicate(study, tmp_path, config(30, seed_replicates=3), unlucky(-1)).trials
    ] == [4] * 5
    assert [
        len(one.values) for one in replicate(study, tmp_path, config(30, seed_replicates=1), unlucky(-1)).trials
    ] == [2] * 5
    assert set(tasks(tmp_path).values()) == {1}


def test_none_are_run_where_none_are_requested_or_trials_are_missing(tmp_path: Path) -> None:
    study = search(tmp_path, config(3))
    for settings in (config(3, seed_replicates=0), config(3, seed_replicates=None), config(4)):
        objective: Any = Search(TrialFiles(tmp_path / "oof"))
        assert run_seed_replicates(study, objective, settings, metric="f1", seed=42, since=0.0) is None
    assert [summary.study_name for summary in optuna.get_all_study_summaries(study._storage)] == [tmp_path.name]


def test_a_long_study_has_seed_replicates_by_default() -> None:
    assert [StudyConfig(n_trials=n).n_seed_replicates for n in (1, 199, 200, 1000)] == [0, 0, 2, 2]
    assert StudyConfig(n_trials=500, seed_replicates=0).n_seed_replicates == 0
    with pytest.raises(ConfigError, match=r"hpo.seed_replicates: expected 0 or more, or null, got -1"):
        StudyConfig(seed_replicates=-1)


def test_no_seed_replicate_is_begun_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    now = [1000.0]
    monkeypatch.setattr("lightning_bge.hpo.seed_replicates.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(trial: optuna.Trial, seed: int) -> float:
        now[0] += 3600
        return 0.0 if trial.user_attrs["replicate_of"] == best[0] else 1.0

    found = replicate(study, tmp_path, config(timeout=1800), slow, since=1000.0)
    assert (found.missing, found.elsewhere) == (9, 0)
    assert found.winner == found.before == best[0]  # nothing is decided before all have their seeds
    assert found.trials[0].values[1:] == (0.0, None)
    assert found.trials[0].mean is None
    assert "9 of them are missing" in describe_seed_replicates(found.as_dict(), "f1")[-1]
    assert replicate(study, tmp_path, config(), slow).winner == best[1]
    assert set(tasks(tmp_path).values()) == {1}


def test_a_failing_seed_replicate_ends_the_call_and_the_next_call_continues(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    calls = []

    def fails(trial: optuna.Trial, seed: int) -> float:
        calls.append(trial.user_attrs["replicate_of"])
        if len(calls) == 4:
            raise ZeroDivisionError
        return trial.params["lr"]

    with pytest.raises(ZeroDivisionError):
        replicate(study, tmp_path, config(), fails)
    assert tasks(tmp_path).total() == 3
    assert replicate(study, tmp_path, config(), fails).missing == 0
    assert len(calls) == 11
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in by_score(study)[:5] for seed in (43, 44)], 1)


def begun(study: optuna.Study, task: tuple[int, int], **worker: Any) -> optuna.Trial:
    """A replicate that another process has just begun."""
    again, (of, seed) = _open(study), task
    again.enqueue_trial(study.trials[of].params, user_attrs={"replicate_of": of, "seed": seed})
    trial = again.ask()
    trial.set_user_attr("worker", {**this_worker(), **worker})
    return trial


DEAD = {"start": "another process's"}


def test_a_seed_replicate_whose_process_was_killed_is_run_once_more(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    begun(study, (best[1], 44), **DEAD)
    sweep(_open(study))
    [queued] = replicates_of(tmp_path).get_trials(states=(TrialState.WAITING,))
    assert (queued.user_attrs["replicate_of"], queued.user_attrs["seed"]) == (best[1], 44)
    found = replicate(study, tmp_path, config(), unlucky(best[0]))
    assert (found.missing, found.winner) == (0, best[1])
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in best[:5] for seed in (43, 44)], 1)
    states = Counter(trial.state for trial in replicates_of(tmp_path).trials)
    assert states == {TrialState.COMPLETE: 10, TrialState.FAIL: 1}


def test_a_seed_replicate_whose_retry_was_never_queued_is_run_once_more(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    trial = begun(study, (best[1], 44))
    # what a sweep leaves that is killed between its two steps
    trial.set_user_attr("swept", "process 1 is gone")
    _open(study).tell(trial.number, state=TrialState.FAIL)
    assert replicate(study, tmp_path, config(), unlucky(-1)).missing == 0
    assert tasks(tmp_path)[best[1], 44] == 1


def test_a_seed_replicate_that_kills_its_process_is_given_up_and_its_trial_does_not_win(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    for _ in range(3):
        begun(study, (best[0], 43), **DEAD)
        sweep(_open(study), max_retries=0)
    found = replicate(study, tmp_path, config(), unlucky(-1))
    assert found.trials[0].values[1] is None
    assert (found.missing, found.before, found.winner) == (0, best[0], best[1])
    assert (best[0], 43) not in tasks(tmp_path)
    assert f"trial {best[0]}: not every seed has a value" in "\n".join(describe_seed_replicates(found.as_dict(), "f1"))


def test_ctrl_c_is_not_a_failure_of_the_seed_replicate(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    for _ in range(5):
        trial = begun(study, (best[0], 43))
        abandon(_open(study), trial.number, "interrupted: KeyboardInterrupt", max_retries=99)
    assert replicate(study, tmp_path, config(), unlucky(-1)).missing == 0
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in best[:5] for seed in (43, 44)], 1)


def test_a_trial_with_a_seed_replicate_without_a_value_can_not_win(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)

    def diverges(trial: optuna.Trial, seed: int) -> float:
        if trial.user_attrs["replicate_of"] in best[:2] and seed == 44:
            raise optuna.TrialPruned
        return trial.params["lr"]

    found = replicate(study, tmp_path, config(), diverges)
    assert (found.missing, found.winner) == (0, best[2])
    assert tasks(tmp_path, TrialState.PRUNED) == {(best[0], 44): 1, (best[1], 44): 1}

    def never(trial: optuna.Trial, seed: int) -> float:
        raise optuna.TrialPruned

    other = tmp_path / "other"
    other.mkdir()
    study = search(other, config())
    assert replicate(study, other, config(), never).winner == by_score(study)[0]


def test_a_seed_replicate_that_another_process_runs_is_not_run_here(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    parent = os.getppid()
    trial = begun(study, (best[0], 43), pid=parent, start=_start_time(parent))
    found = replicate(study, tmp_path, config(), unlucky(best[0]))
    assert (found.missing, found.elsewhere, found.winner) == (1, 1, best[0])
    assert tasks(tmp_path).total() == 9
    _open(study).tell(trial.number, 0.0)
    found = replicate(study, tmp_path, config(), unlucky(best[0]))
    assert (found.missing, found.elsewhere, found.winner) == (0, 0, best[1])
    assert found.trials[0].values[1] == 0.0


def test_of_two_equal_seed_replicates_the_later_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    again = _open(study)
    for of in (best[0], best[0], best[6]):  # one replicate twice, and one of a trial that is not among the best
        again.enqueue_trial(study.trials[of].params, user_attrs={"replicate_of": of, "seed": 43})
    capsys.readouterr()
    assert replicate(study, tmp_path, config(), unlucky(-1)).missing == 0
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in best[:5] for seed in (43, 44)], 1)
    assert tasks(tmp_path, TrialState.FAIL) == {(best[0], 43): 1, (best[6], 43): 1}
    assert len(capsys.readouterr().out.splitlines()) == 10  # and says nothing of it


def test_several_workers_run_each_seed_replicate_once(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    found: list[SeedReplicates] = []
    ran: list[tuple[int, int]] = []

    def value(trial: optuna.Trial, seed: int) -> float:
        ran.append((trial.user_attrs["replicate_of"], seed))
        time.sleep(0.02)
        return trial.params["lr"]

    def work() -> None:
        own = optuna.load_study(study_name=tmp_path.name, storage=open_storage(tmp_path / "journal.log"))
        found.append(replicate(own, tmp_path, config(), value))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    everything = {(of, seed): 1 for of in by_score(study)[:5] for seed in (43, 44)}
    assert Counter(ran) == tasks(tmp_path) == everything
    assert len(found) == 3
    assert [one for one in found if not one.missing]  # whoever was last knows all
    assert all(one.elsewhere for one in found if one.missing)


def test_the_description_names_the_winner_and_whether_it_changed() -> None:
    trials = (ReplicatedTrial(7, (0.5, 0.25)), ReplicatedTrial(3, (0.375, 0.4375)))
    changed = SeedReplicates((43,), trials, before=7, winner=3, missing=0, elsewhere=0)
    first, seven, three, last = describe_seed_replicates(changed.as_dict(), "f1")
    assert first == "seed replicates of the best 2 trials: f1, mean +- standard deviation over 2 seeds"
    assert seven == "  trial 7: 0.3750 +- 0.1768 (in the study 0.5000)"
    assert three.endswith("(in the study 0.3750) <- the winner")
    assert last == "the winner is trial 3, and not the study's best trial, 7"
    same = SeedReplicates((43,), trials, before=7, winner=7, missing=0, elsewhere=0)
    assert describe_seed_replicates(same.as_dict(), "f1")[-1] == "the winner is the study's best trial"
