"""A study as it stands in its run folder, read without touching it, while workers go on: plain data for reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import FINISHED, JOURNAL, StudyConfig
from lightning_bge.hpo.forecast.eta import Eta, being_run, estimate_end
from lightning_bge.hpo.pruning.asha import CONTINUES, PAUSED, continued
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import cost_of, score_of
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.storage import death_of

# how a trial stands: `went on` is one that was paused and is continued by a later trial; `diverged` ended by a NaN
Outcome = Literal[
    "complete",
    "paused",
    "went on",
    "pruned",
    "diverged",
    "out of memory",
    "failed",
    "interrupted",
    "running",
    "waiting",
]
SEED_REPLICATES = "-seed-replicates"


@dataclass(frozen=True)
class PastTrial:
    """One trial of a study.

    Attributes:
        number: from 0.
        outcome: how it ended, or that it has not.
        start: local time; None: it waits.
        end: likewise; None: it has not ended, or its process died and nobody has noted when.
        value: the score of a trial that ran to its end, else None.
        cost: in seconds; None where the study has none.
        params: its settings by their dotted names.
        reports: report, from 1 -> the mean over the folds so far. A trial that continues another has its reports too.
        curve: each fold's validations; empty before the trial's end.
        fold_scores: of a trial that ran to its end.
        paused_at: likewise, where it may be resumed.
        continues: the number of the paused trial that it goes on with.
        oom: what ran out of memory: where, kind, asked, free, text; empty where nothing did.
        note: why it was interrupted, or the value that was not finite; empty otherwise.
    """

    number: int
    outcome: Outcome
    start: datetime | None = None
    end: datetime | None = None
    value: float | None = None
    cost: float | None = None
    params: dict[str, Any] = field(default_factory=dict)
    reports: dict[int, float] = field(default_factory=dict)
    curve: tuple[tuple[Report, ...], ...] = ()
    fold_scores: tuple[float, ...] = ()
    paused_at: int | None = None
    continues: int | None = None
    oom: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def last_report(self) -> int:
        """The last report that it made; 0: none."""
        return max(self.reports, default=0) or max((one.step for fold in self.curve for one in fold), default=0)

    @property
    def curve_seconds(self) -> float:
        """Wall-clock seconds of all its reports, training and validation, those of the trials it continues too."""
        return sum(one.train_seconds + one.val_seconds for fold in self.curve for one in fold)


@dataclass(frozen=True)
class History:
    """A study.

    Attributes:
        name: of the study.
        direction: of the score: `maximize` or `minimize`.
        metric: its name.
        objective: a fold's score is its `best` epoch's or its `last` one's.
        cost: what is minimised besides; None: nothing.
        steps: folds, epochs and reports of a trial that runs to its end.
        planned: how many trials are to be finished in all; None: the folder's config.yaml does not say.
        pruner: name of the pruner; None: likewise.
        space: what is searched: dotted name -> distribution, as plain data (`space_to_json`).
        trials: by their numbers.
        seed_replicates: the best trials' runs with other seeds.
        read: local time at which all this was so.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    metric: str
    objective: str
    cost: str | None
    steps: Steps
    planned: int | None
    pruner: str | None
    space: dict[str, dict[str, Any]]
    trials: tuple[PastTrial, ...]
    seed_replicates: tuple[PastTrial, ...]
    read: datetime

    @property
    def counts(self) -> Counter[str]:
        """Number of trials by outcome."""
        return Counter(trial.outcome for trial in self.trials)

    @property
    def begun(self) -> int:
        """Trials that have ended, to be compared with `planned`; one that was paused and resumed counts once."""
        ended = ("complete", "paused", "went on", "pruned", "diverged", "out of memory")
        return sum(trial.outcome in ended and trial.continues is None for trial in self.trials)

    @property
    def ranked(self) -> list[PastTrial]:
        """The trials that ran to their end, the best score first, of equal ones the cheaper, then the older."""
        return sorted((trial for trial in self.trials if trial.value is not None), key=self.rank)

    def rank(self, trial: PastTrial) -> tuple[float, ...]:
        """What complete trials are sorted by, the best first."""
        score = trial.value or 0.0
        return -score if self.direction == "maximize" else score, trial.cost or 0.0, trial.number

    @property
    def best(self) -> PastTrial | None:
        """The first of them."""
        return next(iter(self.ranked), None)

    @property
    def going_on(self) -> bool:
        """Whether anything runs now, the seed replicates included."""
        return any(trial.outcome == "running" for trial in (*self.trials, *self.seed_replicates))


def read_history(run_dir: Path) -> History | None:
    """Read the study of a run folder, without writing, locking or cleaning anything there.

    What is being written meanwhile, and a last line that a kill tore, is left out.

    Args:
        run_dir: the run's folder, with `journal.log` and, for the number of planned trials, `config.yaml`.

    Returns:
        None where there is no study, or only just one, which nothing is said about yet.

    Raises:
        StudyError: a line of the journal before the last is corrupt, or its study is not one of `lightning-bge hpo`.
    """
    study, seed_replicates = _load(run_dir)
    if study is None:
        return None
    trials = _past_trials(study.get_trials(deepcopy=False))
    return _describe(run_dir, study, trials, _past_trials(seed_replicates))


def time_left(run_dir: Path) -> Eta | None:
    """How long the search of a run folder still takes, seed replicates and refit included; read as by `read_history`.

    Returns:
        None where nothing runs, nothing has ended yet, or config.yaml does not say what is planned.
    """
    study, seed_replicates = _load(run_dir)
    if study is None:
        return None
    trials = study.get_trials(deepcopy=False)
    history, asked = _describe(run_dir, study, (), ()), _config(run_dir).get("hpo") or {}
    running = being_run([*trials, *seed_replicates])
    if not running or history.planned is None:
        return None
    return estimate_end(
        trials,
        PrunerConfig(**(asked.get("pruner") or {})),
        history.planned,
        history.steps,
        len(running),
        history.read,
        history.direction,
        sampler=asked.get("sampler", "tpe"),
        seeds=StudyConfig(n_trials=history.planned, seed_replicates=asked.get("seed_replicates")).n_seed_replicates,
        replicated=sum(trial.state in FINISHED for trial in seed_replicates),
        refit=bool(asked.get("refit", True)),
    )


def _load(run_dir: Path) -> tuple[optuna.Study | None, list[FrozenTrial]]:
    """The study of a run folder, None where there is none yet, and the trials of its seed replicates."""
    if not (run_dir / JOURNAL).is_file():
        return None, []
    storage = JournalStorage(_ReadOnly(run_dir / JOURNAL))
    names = [study.study_name for study in storage.get_all_studies()]
    searches = [name for name in names if not name.endswith(SEED_REPLICATES)]
    # the study has its folder's name, unless that was renamed since
    name = run_dir.name if run_dir.name in names else next(iter(searches), None)
    if name is None:
        return None, []
    study = optuna.load_study(study_name=name, storage=storage)
    if "settings" not in study.user_attrs or "space" not in study.user_attrs:
        return None, []
    if f"{name}{SEED_REPLICATES}" not in names:
        return study, []
    replicates = optuna.load_study(study_name=f"{name}{SEED_REPLICATES}", storage=storage)
    return study, [trial for trial in replicates.get_trials(deepcopy=False) if "redundant" not in trial.user_attrs]


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}


def _describe(
    run_dir: Path, study: optuna.Study, trials: tuple[PastTrial, ...], seed_replicates: tuple[PastTrial, ...]
) -> History:
    settings, space = study.user_attrs["settings"], study.user_attrs["space"]
    asked = _config(run_dir).get("hpo") or {}
    if "monitor.metric" not in settings:
        raise StudyError(
            f"{run_dir / JOURNAL}: the study {study.study_name} does not say its metric, so that it is not one of "
            "`lightning-bge hpo`. Name the run folder of such a search"
        )
    return History(
        name=study.study_name,
        direction="maximize" if study.directions[0] == StudyDirection.MAXIMIZE else "minimize",
        metric=settings["monitor.metric"],
        objective=settings.get("monitor.objective", "best"),
        cost=settings.get("hpo.cost"),
        steps=Steps(**study.user_attrs["steps"]) if "steps" in study.user_attrs else _steps(settings, space),
        planned=asked.get("n_trials"),
        pruner=(asked.get("pruner") or {}).get("name"),
        space=space,
        trials=trials,
        seed_replicates=seed_replicates,
        read=datetime.now(),
    )


def _steps(settings: dict[str, Any], space: dict[str, dict[str, Any]]) -> Steps:
    """Of a study of before, which does not say them."""
    searched = space.get("trainer.max_epochs", {}).get("attributes", {})
    most = [settings.get("trainer.max_epochs"), searched.get("high"), *searched.get("choices", [])]
    epochs = max((one for one in most if one is not None), default=1)
    return Steps(settings.get("data.split.folds", 1), epochs, round(1 / settings.get("hpo.val_check_interval", 1)))


def _past_trials(trials: Sequence[FrozenTrial]) -> tuple[PastTrial, ...]:
    went_on = continued(trials)
    return tuple(_past_trial(trial, trial.number in went_on) for trial in trials)


def _past_trial(trial: FrozenTrial, went_on: bool) -> PastTrial:
    known = trial.user_attrs
    outcome, note = _outcome(trial, went_on)
    complete = trial.state == TrialState.COMPLETE
    return PastTrial(
        number=trial.number,
        outcome=outcome,
        start=trial.datetime_start,
        end=trial.datetime_complete,
        value=score_of(trial) if complete else None,  # of others Optuna has the last report here
        cost=cost_of(trial) if complete else None,
        params=dict(trial.params),
        reports=dict(sorted(trial.intermediate_values.items())),
        curve=tuple(tuple(Report(*report) for report in fold) for fold in known.get("curve", ())),
        fold_scores=tuple(known.get("fold_scores", ())),
        paused_at=known.get(PAUSED),
        continues=known.get(CONTINUES),
        oom={key.removeprefix("oom_"): value for key, value in known.items() if key.startswith("oom_")},
        note=note,
    )


def _outcome(trial: FrozenTrial, went_on: bool) -> tuple[Outcome, str]:
    known = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        return "complete", ""
    if trial.state == TrialState.WAITING:
        return "waiting", ""
    if trial.state == TrialState.RUNNING:
        death = death_of(trial)
        return ("running", "") if death is None else ("interrupted", death)
    if trial.state == TrialState.FAIL:
        return ("interrupted", str(known["swept"])) if "swept" in known else ("failed", "")
    if "oom_where" in known:
        return "out of memory", ""
    if "nan" in known:
        return "diverged", str(known["nan"])
    if PAUSED in known:
        return "went on" if went_on else "paused", ""
    return "pruned", ""


class _ReadOnly(BaseJournalBackend):
    """A journal of which only whole lines are read, and to which nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    return  # torn, or being written
                if number < log_number_from:
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    if not file.read(1):
                        return
                    raise StudyError(
                        f"{self.path}: line {number + 1} is not a record of the journal, and more lines follow it. "
                        "Restore the file from a copy, or delete that line if you accept losing what it says."
                    ) from error
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError(f"{self.path} is only read here")
