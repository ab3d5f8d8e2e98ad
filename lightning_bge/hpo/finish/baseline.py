"""The configured options trained on all folds, without a search: what the search is compared with."""

from __future__ import annotations

from dataclasses import replace

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.config import BASELINE
from lightning_bge.hpo.ranking import ranked, score_of
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import run_trials
from lightning_bge.hpo.scheduling.trial_queue import TrialQueue, Tries
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trials import is_to_be_continued
from lightning_bge.runtime.compat.optuna import storage_of
from lightning_bge.runtime.stop import StopRequest

FOLDER = "baseline"  # of its checkpoints and predictions, beside those of the study


class BaselineQueue(TrialQueue):
    """The one trial of the configured options; it has no parameters.

    Args:
        studies: of the study that is compared with it.
    """

    def __init__(self, studies: StudyQueue) -> None:
        study = optuna.create_study(
            storage=storage_of(studies.study),
            study_name=f"{studies.study.study_name}{BASELINE}",
            direction=studies.study.directions[0],
            sampler=optuna.samplers.RandomSampler(),  # never used: there are no parameters
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        checkpoints = studies.checkpoints / FOLDER
        super().__init__(study, studies.worker, studies.config, studies.run_dir, checkpoints)

    def begin(self, tries: Tries) -> optuna.Trial | None:
        """Begin the trial, or continue it where its process died."""
        if not tries.by_set:
            return self.start(create_trial(state=TrialState.WAITING), {})
        [made] = tries.by_set.values()
        return self.retry(made[-1]) if is_to_be_continued(made) else None

    def check_failures(self, tries: Tries) -> None:
        """A baseline that fails is one without a value: the summary says so."""


def run_baseline(
    studies: StudyQueue, objective: Objective, *, epochs: int, metric: str, until: float, request: StopRequest
) -> FrozenTrial | None:
    """Train the configured options once, on the folds of a study that has ended; several processes may call this.

    Args:
        studies: of the study.
        objective: of the study.
        epochs: of each fold.
        metric: its name.
        until: `time.monotonic()` after which it does not begin.
        request: whether to stop.

    Returns:
        The trial; None where it is not requested, trials of the study are missing, or it has not ended with a score.
    """
    if not studies.config.baseline or not studies.is_finished() or not ranked(studies.study):
        return None
    queue = BaselineQueue(studies)
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

    run_trials(queue, train, until=until, request=request, report=report)
    complete = queue.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return complete[-1] if complete else None
