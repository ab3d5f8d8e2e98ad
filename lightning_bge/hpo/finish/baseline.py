"""The configured options trained on all folds, without a search: what the search is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.config import BASELINE
from lightning_bge.hpo.finish.end_queue import EndQueue
from lightning_bge.hpo.ranking import ranked, score_of
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import run_trials
from lightning_bge.hpo.scheduling.trial_queue import Tries
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trials import is_to_be_continued
from lightning_bge.runtime.stop import StopRequest

CONFIGURED = "configured"  # user attribute of its trial: the configured values
FOLDER = "baseline"  # of its checkpoints and predictions, beside those of the study


class BaselineQueue(EndQueue):
    """The one trial of the configured options; it has no parameters.

    Args:
        studies: of the study that is compared with it.
        configured: the values of what is searched, and the epochs: with others a new trial is needed.
    """

    def __init__(self, studies: StudyQueue, configured: Mapping[str, Any]) -> None:
        super().__init__(studies, BASELINE, FOLDER)
        self.configured = json.loads(json.dumps(configured, default=str))

    def begin(self, tries: Tries) -> optuna.Trial | None:
        """Begin the trial, or continue it where its process died."""
        found = [made for made in tries.by_set.values() if self.is_present(made[-1])]
        if not found:
            return self.start(create_trial(state=TrialState.WAITING), {CONFIGURED: self.configured})
        return self.retry(found[-1][-1]) if is_to_be_continued(found[-1]) else None

    def is_present(self, trial: FrozenTrial) -> bool:
        """Whether a trial was made with what is configured now."""
        return trial.user_attrs.get(CONFIGURED) == self.configured


def run_baseline(
    studies: StudyQueue,
    objective: Objective,
    *,
    configured: Mapping[str, Any],
    metric: str,
    until: float,
    request: StopRequest,
) -> FrozenTrial | None:
    """Train the configured options once, on the folds of a study that has ended; several processes may call this.

    Args:
        studies: of the study.
        objective: of the study.
        configured: the values of what is searched, and `trainer.max_epochs` of each fold, by their dotted names.
        metric: its name.
        until: `time.monotonic()` after which it does not begin.
        request: whether to stop.

    Returns:
        The trial; None where it is not requested, trials of the study are missing, or it has not ended with a score.
    """
    if not studies.config.baseline or not studies.is_finished() or not ranked(studies.study):
        return None
    queue, epochs = BaselineQueue(studies, configured), configured["trainer.max_epochs"]
    steps, files = replace(objective.steps, epochs=epochs), objective.files.within(FOLDER)
    train = replace(
        objective,
        build=lambda params: objective.build({"trainer.max_epochs": epochs, **params}),
        space=Space({}, {}),
        steps=steps,
        files=files,
        cost=None,
        n_trials=1,
    )

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        shown = f"{metric} {score_of(trial):.4f}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
        print(f"configured hyperparameters, without a search: {shown}", flush=True)

    run_trials(queue, train, until=until, request=request, report=objective.tracking.reporting(report))
    complete = queue.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [trial for trial in complete if queue.is_present(trial)]
    return found[-1] if found else None
