"""Writes the run folder of a made-up study of any size within seconds: its journal and its configuration."""

from __future__ import annotations

import json
import math
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.space.search_space import is_drawn, parse_space, space_to_json
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.trials import (
    ERROR,
    PARAMETER_SET,
    PAUSED_AT,
    REPORTS_BEFORE,
    RESUMES,
    WORKER,
    WORKER_LOST,
)

SPACE: dict[str, dict[str, Any]] = {
    "model.optimizer.lr": {"low": 1.0e-5, "high": 3.0e-4, "log": True},
    "model.optimizer.weight_decay": {"low": 1.0e-4, "high": 0.1, "log": True},
    "model.schedule.warmup": {"low": 0.0, "high": 0.2},
    "model.dropout": {"choices": [0.0, 0.1, 0.2]},
    "data.batch_size": {"choices": [16, 32, 64]},
    "model.loss.name": {"choices": ["bce", "focal"]},
    "model.loss.focal_gamma": {"low": 0.5, "high": 5.0, "when": {"model.loss.name": "focal"}},
}
START = datetime(2026, 3, 2, 9, 0)
TOTAL = 15  # 5 folds of 3 epochs
RUNGS = (1, 4)
_workers: list[Worker] = []  # those that live until this process ends


class Unlocked(JournalFileBackend):
    """A journal file that is written without a lock, and without waiting for the disk."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with open(self._file_path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)


def journal_of(run_dir: Path) -> JournalStorage:
    """The journal of a run folder, as Optuna opens it."""
    return JournalStorage(JournalFileBackend(str(run_dir / "journal.log")))


def new_study(run_dir: Path, planned: int, folds: int = 5, cost: str | None = None, **settings: Any) -> optuna.Study:
    """An empty study in a run folder, as `lightning-bge hpo` writes it before the first trial."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pruner = "asha" if cost is None else "none"
    config = {"monitor": {"metric": "f1"}, "hpo": {"n_trials": planned, "pruner": {"name": pruner}}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    study = optuna.create_study(
        study_name=run_dir.name,
        directions=["maximize"] if cost is None else ["maximize", "minimize"],
        storage=JournalStorage(Unlocked(str(run_dir / "journal.log"))),
    )
    known = {"monitor.metric": "f1", "monitor.objective": "best", "data.split.folds": folds, "trainer.max_epochs": 3}
    study.set_user_attr("space", space_to_json(parse_space(SPACE)))
    study.set_user_attr("settings", known | settings | ({} if cost is None else {"hpo.cost": cost}))
    study.set_user_attr("steps", {"folds": folds, "epochs": 3, "per_epoch": 1})
    return study


def draw(rng: random.Random) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Hyperparameters of one trial, and their distributions."""
    space, params = parse_space(SPACE), {}
    for name in space:
        spec = SPACE[name]
        if not is_drawn(space, name, params):
            continue
        if "choices" in spec:
            params[name] = rng.choice(spec["choices"])
        elif spec.get("log"):
            params[name] = math.exp(rng.uniform(math.log(spec["low"]), math.log(spec["high"])))
        else:
            params[name] = rng.uniform(spec["low"], spec["high"])
    return params, {name: space[name] for name in params}


def draw_values(params: dict[str, Any], rng: random.Random) -> tuple[list[float], list[list[float]]]:
    """The values that a trial reports at the steps 1..15, and the validations of each fold."""
    quality = 0.86 - 0.12 * abs(math.log10(params["model.optimizer.lr"]) + 4.2) - 0.25 * params["model.dropout"] ** 2
    quality += rng.gauss(0, 0.015) - 0.01 * (params["data.batch_size"] == 64)
    folds, means, done = [], [], []
    for fold in range(5):
        end = quality - 0.02 * (fold == 2) + rng.gauss(0, 0.008)
        values = [end - 0.2 * 0.35**epoch + rng.gauss(0, 0.004) for epoch in range(3)]
        folds.append(values)
        means += [(sum(done) + max(values[: epoch + 1])) / (fold + 1) for epoch in range(3)]
        done.append(max(values))
    return means, folds


class Maker:
    """Makes the trials of a study with ASHA, one after another on so many workers."""

    def __init__(self, seed: int = 0, workers: int = 1, minutes: float = 1.6) -> None:
        self.rng = random.Random(seed)
        self.free = [START] * workers
        self.seconds = 60 * minutes  # of a step
        self.trials: list[FrozenTrial] = []
        self.seen: dict[int, list[float]] = {rung: [] for rung in RUNGS}

    def span(self, seconds: float) -> dict[str, datetime]:
        """Occupy the worker that is free first, and return start and end."""
        self.free.sort()
        start = self.free.pop(0)
        self.free.append(start + timedelta(seconds=seconds))
        return {"datetime_start": start, "datetime_complete": self.free[-1]}

    def add(self, state: TrialState, drawn: Any, made: int, seconds: float, attrs: dict[str, Any], **more: Any) -> None:
        params, distributions, means, folds, pace = drawn
        curve = [
            [[3 * fold + i + 1, folds[fold][i], 0.85 * pace, 0.15 * pace, pace, 0.1] for i in range(min(3, left))]
            for fold in range(5)
            if (left := made - 3 * fold) > 0
        ]
        trial = create_trial(
            state=state,
            params=params,
            distributions=distributions,
            intermediate_values=dict(enumerate(means[:made], start=1)),
            user_attrs=({"curve": curve} if state.is_finished() and made else {}) | attrs,
            value=means[-1] if state == TrialState.COMPLETE else None,
        )
        trial.number = len(self.trials)
        for name, moment in {**self.span(seconds), **more}.items():
            setattr(trial, name, moment)
        self.trials.append(trial)

    def one(self) -> None:
        """Add the trials of one parameter set: paused at rungs, resumed if in the top quarter, or failed by chance."""
        params, distributions = draw(self.rng)
        pace = self.seconds * self.rng.uniform(0.8, 1.3) * (1.2 if params["data.batch_size"] == 16 else 1.0)
        drawn = (params, distributions, *draw_values(params, self.rng), pace)
        luck = self.rng.random()
        if luck < 0.006:
            oom = {"oom_where": "training", "oom_kind": "cuda", "oom_requested": 2 * 2**30, "oom_free": 2**29}
            return self.add(TrialState.PRUNED, drawn, 0, 0.2 * pace, oom)
        if luck < 0.010:
            return self.add(TrialState.FAIL, drawn, 0, 0.4 * pace, {ERROR: "ValueError: a row has no label"})
        if luck < 0.014:
            return self.add(TrialState.FAIL, drawn, 1, 1.4 * pace, {WORKER_LOST: "process 4711 on here is gone"})
        if luck < 0.018:
            return self.add(TrialState.PRUNED, drawn, 1, 1.1 * pace, {"nan": "nan", "pruned_at": 2})
        parent, done = {}, 0
        for rung in (*RUNGS, TOTAL):
            if rung == TOTAL:
                scores = {"fold_scores": [max(fold) for fold in drawn[3]], "fold_epochs": [3] * 5}
                return self.add(TrialState.COMPLETE, drawn, TOTAL, (TOTAL - done) * pace, {**parent, **scores})
            self.seen[rung].append(drawn[2][rung - 1])
            top = sorted(self.seen[rung], reverse=True)[: max(1, len(self.seen[rung]) // 4)]
            if drawn[2][rung - 1] >= top[-1] and self.rng.random() < 0.6:
                continue
            paused = {**parent, PAUSED_AT: rung, "pruned_at": rung}
            self.add(TrialState.PRUNED, drawn, rung, (rung - done) * pace, paused)
            if drawn[2][rung - 1] < top[-1]:
                return None
            last = len(self.trials) - 1
            parent = {RESUMES: last, PARAMETER_SET: parent.get(PARAMETER_SET, last), REPORTS_BEFORE: rung}
            done = rung
        return None


def make_study(run_dir: Path, parameter_sets: int, seed: int = 0, workers: int = 1, running: bool = False) -> Path:
    """Write the run folder of a made-up study of so many parameter sets; `running`: this process is its worker."""
    study, maker = new_study(run_dir, parameter_sets + 100 * running), Maker(seed, workers)
    for _ in range(parameter_sets):
        maker.one()
    if running:  # the last trial has started a few minutes ago
        late = datetime.now() - timedelta(minutes=7) - max(maker.free)
        for trial in maker.trials:
            trial.datetime_start, trial.datetime_complete = trial.datetime_start + late, trial.datetime_complete + late
        params, distributions = draw(maker.rng)
        drawn = (params, distributions, *draw_values(params, maker.rng), maker.seconds)
        _workers.append(Worker(run_dir).__enter__())
        start = datetime.now() - timedelta(minutes=7)
        maker.add(
            TrialState.RUNNING,
            drawn,
            4,
            60,
            {WORKER: _workers[-1].record},
            datetime_start=start,
            datetime_complete=None,
        )
    study.add_trials(maker.trials)
    return run_dir
