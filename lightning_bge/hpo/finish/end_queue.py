"""Trials that are trained when those of a study have ended, in a study of their own beside it in the same journal."""

from __future__ import annotations

import optuna

from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_queue import TrialQueue, Tries
from lightning_bge.runtime.compat.optuna import storage_of


class EndQueue(TrialQueue):
    """Trials whose parameters are all given, and of which none is pruned.

    Args:
        studies: of the study that has ended.
        suffix: of the name of their own study, which begins with that of the other one.
        folder: of their checkpoints, beside those of the study.
    """

    def __init__(self, studies: StudyQueue, suffix: str, folder: str) -> None:
        study = optuna.create_study(
            storage=storage_of(studies.study),
            study_name=f"{studies.study.study_name}{suffix}",
            direction=studies.study.directions[0],
            sampler=optuna.samplers.RandomSampler(),  # never used: all parameters are given
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        super().__init__(study, studies.place, studies.worker, studies.config, folder)

    def check_failures(self, tries: Tries) -> None:
        """One that fails counts as one without a value, and the study ends all the same."""
