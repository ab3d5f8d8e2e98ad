"""Ends a study when further trials are not worth their time, as Optuna's `Terminator` estimates it.

Optuna 5 calls its module `optuna.terminator` deprecated, and 6 will have it no more.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna import terminator
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (ExperimentalWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


def report_fold_scores(trial: optuna.Trial, scores: Sequence[float]) -> None:
    """Keep the scores of a trial's folds, from which the error of cross-validation is estimated."""
    with _quietly():
        terminator.report_cross_validation_scores(trial, list(scores))


class StudyEnd:
    """Whether further trials are worth their time.

    Compares the improvement that may still be expected with the error of cross-validation of the best trial (Makarova
    et al., 2022, arXiv:2104.08166). Asked when another trial is complete, from the 20th on.

    Args:
        study: its complete trials have the scores of their folds (`report_fold_scores`).

    Attributes:
        reached: whether the study is to end.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.reached, self._seen = study, False, 0
        with _quietly():
            self._terminator = terminator.Terminator()

    def update(self) -> None:
        """Ask once more if there are more complete trials than before."""
        complete = len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if complete == self._seen or self.reached:
            return
        self._seen = complete
        with _quietly():
            self.reached = self._terminator.should_terminate(self.study)
        if self.reached:
            print(f"hpo.terminator: after {complete} complete trials more is not expected to be gained", flush=True)
