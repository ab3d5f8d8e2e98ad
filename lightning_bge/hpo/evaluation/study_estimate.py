"""The estimate for an Optuna study: which of its trials were in the selection, and what was kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.evaluation.candidates import Candidate, Target, Validation
from lightning_bge.hpo.evaluation.estimate import Contest, estimate
from lightning_bge.hpo.evaluation.resampling import ValidationRows
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.kept_predictions import kept_file, kept_steps, load_logits
from lightning_bge.hpo.trials import latest_trials, parameter_set_of


@dataclass(frozen=True)
class Kept:
    """The trials whose validations are kept in a folder.

    Attributes:
        folder: with a file for each parameter set.
        steps: of a trial that runs to its end.
    """

    folder: Path
    steps: Steps

    def candidate(self, trial: FrozenTrial) -> Candidate | None:
        """A trial that has ended; None: its predictions are not there, or not complete."""
        number = parameter_set_of(trial)
        path = kept_file(self.folder, number)
        complete = trial.state == TrialState.COMPLETE
        last = self.steps.total if complete else int(trial.user_attrs["pruned_at"])
        expected = {int(report[0]) for fold in trial.user_attrs.get("curve", []) for report in fold}
        if not path.is_file() or not expected or not expected <= kept_steps(path):
            return None

        def load() -> list[Validation]:
            return [Validation(step, found.numpy()) for step, found in load_logits(path).items() if step in expected]

        return Candidate(number, last, load)


def selected_from(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were compared: each parameter set's last one, where it is complete or the pruner has ended it.

    What ran out of memory, had a value that is not finite, or failed was not compared, and would not have won.
    """
    return [
        trial
        for trial in latest_trials(study.get_trials(deepcopy=False)).values()
        if trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.PRUNED and "pruned_at" in trial.user_attrs and "nan" not in trial.user_attrs)
    ]


def estimate_study(
    study: optuna.Study,
    kept: Kept,
    target: Target,
    rows: ValidationRows,
    *,
    winner: FrozenTrial,
    replicates: dict[int, Sequence[FrozenTrial]],
    replicates_kept: Kept,
    configured: tuple[FrozenTrial, Kept] | None = None,
) -> dict[str, Any]:
    """What a study may say about its winner, as plain data for the summary.

    Args:
        study: all its trials have ended.
        kept: the validations of its trials.
        target: what its trials are compared by.
        rows: that they were validated on.
        winner: the trial that was selected.
        replicates: number of a trial -> its seed replicates, all complete.
        replicates_kept: the validations of these.
        configured: the trial of the options without a search, and where its validations are kept.

    Returns:
        `Estimate.as_dict()` with `n_left_out`, the parameter sets whose predictions are not kept; {"n_left_out"} alone
        where those of the winner are not.
    """
    compared = selected_from(study)
    candidates = [found for trial in compared if (found := kept.candidate(trial)) is not None]
    left_out = len(compared) - len(candidates)
    if parameter_set_of(winner) not in {one.number for one in candidates}:
        return {"n_left_out": left_out}
    by_number = {trial.number: parameter_set_of(trial) for trial in compared}
    seeds: dict[int, Sequence[Candidate]] = {}
    for number, trials in replicates.items():
        each = [one for trial in trials if (one := replicates_kept.candidate(trial)) is not None]
        if len(each) == len(trials):
            seeds[by_number[number]] = each
    alone = None if configured is None else configured[1].candidate(configured[0])
    contest = Contest(
        target=target,
        rows=rows,
        steps=kept.steps,
        candidates=candidates,
        replicates=seeds,
        configured=None if alone is None or configured is None else (alone, configured[1].steps),
    )
    return {**estimate(contest).as_dict(), "n_left_out": left_out}
