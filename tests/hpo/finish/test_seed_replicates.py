"""Seed replicates of the best trials: the right winner, nothing run twice, nothing lost."""

from __future__ import annotations

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
from optuna.trial import TrialState, create_trial

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish.seed_replicates import (
    ReplicatedTrial,
    SeedReplicateQueue,
    SeedReplicates,
    describe_seed_replicates,
    run_seed_replicates,
)
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.space.search_space import parse_space, suggest
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.study import study_storage
from lightning_bge.hpo.trackers.tracking import Tracking
from lightning_bge.hpo.trial.objective import TrialFiles
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.fake_study import run_fake

SPACE = {"lr": {"low": 0.0, "high": 1.0}}
Value = Callable[[optuna.Trial, int], float]


def config(trials: int = 8, **changes: Any) -> StudyConfig:
    return StudyConfig(
        **{"n_trials": trials, "space": SPACE, "pruner": PrunerConfig(name="none"), "seed_replicates": 2, **changes}
    )


@dataclass(frozen=True)
class Search:
    """An objective without training: `lr` in the search, and what the test says with another seed."""

    files: TrialFiles = TrialFiles()  # noqa: RUF009 - frozen
    value: Value = lambda trial, seed: trial.params["lr"]
    cost: str | None = None
    n_trials: int = 0
    steps: Steps = Steps(2, 2)  # noqa: RUF009 - frozen
    tracking: Tracking = Tracking()  # noqa: RUF009 - without trackers

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        params = suggest(trial, parse_space(SPACE))
        if "seed" in trial.user_attrs:
            assert self.files.out_of_fold is None
            return self.value(trial, trial.user_attrs["seed"])
        return params["lr"] if self.cost is None else (params["lr"], float(trial.number))


def search(folder: Path, settings: StudyConfig, direction: Any = "maximize") -> optuna.Study:
    study, _ = run_fake(folder, settings, Search(cost=settings.cost), direction=direction)
    return study


def queue_of(folder: Path, settings: StudyConfig, worker: Worker) -> StudyQueue:
    storage = open_storage(folder / "journal.log")
    study = optuna.load_study(study_name=storage.get_all_studies()[0].study_name, storage=storage)
    return StudyQueue(study, study_storage(folder, settings), worker, settings, parse_space(SPACE))


def replicate(
    study: optuna.Study, folder: Path, settings: StudyConfig, value: Value, until: float = 1e12
) -> SeedReplicates:
    objective: Any = Search(TrialFiles(folder / "oof"), value)
    with Worker(folder) as worker:
        found = run_seed_replicates(
            queue_of(folder, settings, worker), objective, metric="f1", seed=42, until=until, request=StopRequest()
        )
    assert found is not None
    return found


def replicates_of(folder: Path) -> optuna.Study:
    storage = open_storage(folder / "journal.log")
    return optuna.load_study(study_name=storage.get_all_studies()[-1].study_name, storage=storage)


def tasks(folder: Path, *states: TrialState) -> Counter[tuple[int, int]]:
    found = replicates_of(folder).get_trials(states=states or (TrialState.COMPLETE,))
    return Counter((trial.user_attrs["replicate_of"], trial.user_attrs["seed"]) for trial in found)


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
    assert found.missing == 0
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
    search(tmp_path, config(3))
    rest: dict[str, Any] = {"metric": "f1", "seed": 42, "until": 1e12, "request": StopRequest()}
    for settings in (config(3, seed_replicates=0), config(3, seed_replicates=None), config(4)):
        objective: Any = Search(TrialFiles(tmp_path / "oof"))
        with Worker(tmp_path) as worker:
            study = queue_of(tmp_path, settings, worker)
            assert run_seed_replicates(study, objective, **rest) is None
    assert len(open_storage(tmp_path / "journal.log").get_all_studies()) == 1


def test_a_long_study_has_seed_replicates_by_default() -> None:
    assert [StudyConfig(n_trials=n).n_seed_replicates for n in (1, 199, 200, 1000)] == [0, 0, 2, 2]
    assert StudyConfig(n_trials=500, seed_replicates=0).n_seed_replicates == 0
    with pytest.raises(ConfigError, match=r"hpo.seed_replicates: expected 0 or more, or null, got -1"):
        StudyConfig(seed_replicates=-1)


def test_no_seed_replicate_is_begun_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    now = [1000.0]
    monkeypatch.setattr(
        "lightning_bge.hpo.scheduling.trial_queue.time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    )

    def slow(trial: optuna.Trial, seed: int) -> float:
        now[0] += 3600
        return 0.0 if trial.user_attrs["replicate_of"] == best[0] else 1.0

    found = replicate(study, tmp_path, config(), slow, until=2800.0)
    assert found.missing == 9
    assert found.winner == found.before == best[0]  # nothing is decided before all have their seeds
    assert found.trials[0].values[1:] == (0.0, None)
    assert found.trials[0].mean is None
    assert "9 of them are missing" in describe_seed_replicates(found.as_dict(), "f1")[-1]
    assert replicate(study, tmp_path, config(), slow).winner == best[1]
    assert set(tasks(tmp_path).values()) == {1}


def test_a_seed_replicate_that_fails_has_no_value_and_the_others_are_run(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)

    def fails(trial: optuna.Trial, seed: int) -> float:
        if (trial.user_attrs["replicate_of"], seed) == (best[0], 43):
            raise ZeroDivisionError
        return trial.params["lr"]

    found = replicate(study, tmp_path, config(), fails)
    assert (found.missing, found.winner) == (0, best[1])
    assert found.trials[0].values[1] is None
    assert tasks(tmp_path).total() == 9
    assert tasks(tmp_path, TrialState.FAIL) == {(best[0], 43): 1}
    assert replicate(study, tmp_path, config(), fails) == found
    assert tasks(tmp_path, TrialState.FAIL).total() == 1


def begun(folder: Path, study: optuna.Study, task: tuple[int, int], worker: Worker, **attributes: Any) -> int:
    """A seed replicate that a process has begun; returns its number."""
    of, seed = task
    replicates = SeedReplicateQueue(queue_of(folder, config(), worker), (43, 44)).study
    trial = study.trials[of]
    begun = create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={"replicate_of": of, "seed": seed, "worker": worker.record, **attributes},
    )
    replicates.add_trial(begun)
    return replicates.trials[-1].number


def test_a_seed_replicate_whose_process_was_killed_is_continued(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    number = begun(tmp_path, study, (best[1], 44), Worker(tmp_path))  # its lock was never taken
    found = replicate(study, tmp_path, config(), unlucky(best[0]))
    assert (found.missing, found.winner) == (0, best[1])
    assert tasks(tmp_path) == dict.fromkeys([(of, seed) for of in best[:5] for seed in (43, 44)], 1)
    trials = replicates_of(tmp_path).trials
    assert trials[number].state == TrialState.FAIL
    assert "is gone" in trials[number].user_attrs["worker_lost"]
    assert [trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs] == [number]


def test_a_seed_replicate_that_kills_its_process_three_times_has_no_value(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    first = begun(tmp_path, study, (best[0], 43), Worker(tmp_path))
    for _ in range(2):
        begun(tmp_path, study, (best[0], 43), Worker(tmp_path), parameter_set=first)
    found = replicate(study, tmp_path, config(), unlucky(-1))
    assert found.trials[0].values[1] is None
    assert (found.missing, found.before, found.winner) == (0, best[0], best[1])
    assert (best[0], 43) not in tasks(tmp_path)
    assert f"trial {best[0]}: not every seed has a value" in "\n".join(describe_seed_replicates(found.as_dict(), "f1"))


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


def test_a_seed_replicate_that_another_process_runs_is_waited_for(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    best = by_score(study)
    found: list[SeedReplicates] = []
    with Worker(tmp_path) as other:
        number = begun(tmp_path, study, (best[0], 43), other)
        thread = threading.Thread(target=lambda: found.append(replicate(study, tmp_path, config(), unlucky(best[0]))))
        thread.start()
        while tasks(tmp_path).total() < 9:
            time.sleep(0.05)
        assert thread.is_alive()
        replicates_of(tmp_path).tell(number, 0.0)
        thread.join(60)
    assert (found[0].missing, found[0].winner) == (0, best[1])
    assert found[0].trials[0].values[1] == 0.0
    assert tasks(tmp_path).total() == 10


def test_several_workers_run_each_seed_replicate_once(tmp_path: Path) -> None:
    study = search(tmp_path, config())
    found: list[SeedReplicates] = []
    ran: list[tuple[int, int]] = []

    def value(trial: optuna.Trial, seed: int) -> float:
        ran.append((trial.user_attrs["replicate_of"], seed))
        time.sleep(0.02)
        return trial.params["lr"]

    def work() -> None:
        found.append(replicate(study, tmp_path, config(), value))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    everything = {(of, seed): 1 for of in by_score(study)[:5] for seed in (43, 44)}
    assert Counter(ran) == tasks(tmp_path) == everything
    assert len(found) == 3
    assert not any(one.missing for one in found)  # each stays until all have ended


def test_the_description_names_the_winner_and_whether_it_changed() -> None:
    trials = (ReplicatedTrial(7, (0.5, 0.25)), ReplicatedTrial(3, (0.375, 0.4375)))
    changed = SeedReplicates((43,), trials, before=7, winner=3, missing=0)
    first, seven, three, last = describe_seed_replicates(changed.as_dict(), "f1")
    assert first == "seed replicates of the best 2 trials: f1, mean +- standard deviation over 2 seeds"
    assert seven == "  trial 7: 0.3750 +- 0.1768 (in the study 0.5000)"
    assert three.endswith("(in the study 0.3750) <- the winner")
    assert last == "the winner is trial 3, and not the study's best trial, 7"
    same = SeedReplicates((43,), trials, before=7, winner=7, missing=0)
    assert describe_seed_replicates(same.as_dict(), "f1")[-1] == "the winner is the study's best trial"
