"""An objective of given learning curves, which pauses at rungs as training does, and trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.trials import PAUSED_AT, RESUMES, parameter_set_of

Decision = tuple[str, int, int]  # what was decided, about which parameter set, at which rung
SPACE = {"x": {"low": 0.0, "high": 1.0}}


class CurveObjective:
    """Reports a curve for each parameter set, in the order in which they begin; it ends where a value is NaN.

    A resumed trial reports from its first step on, as no checkpoint is kept, and asks after its pause alone.

    Args:
        curves: a value for each step, by parameter set.
        sign: 1 where a higher value is better, else -1.

    Attributes:
        points: the numbers of the parameter sets, in the order of the curves.
        decisions: what was decided so far.
    """

    def __init__(self, curves: Sequence[Sequence[float]], sign: float = 1.0) -> None:
        self.curves, self.sign, self.length = curves, sign, max(map(len, curves))
        self.points: list[int] = []
        self.decisions: list[Decision] = []

    def __call__(self, trial: optuna.Trial) -> float:
        study, pruner = trial.study, trial.study.pruner
        assert isinstance(pruner, AshaPruner)
        trials, rungs = study.get_trials(deepcopy=False), pruner.steps
        if (first := parameter_set_of(trials[trial.number])) not in self.points:
            self.points.append(first)
        number, resumed = self.points.index(first), trial.user_attrs.get(RESUMES)
        start = 0 if resumed is None else trials[resumed].last_step or 0
        self.decisions.append(("resume", number, rungs.index(start)) if start else ("start", number, 0))
        for step, value in enumerate(self.curves[number], start=1):
            if value != value:
                trial.set_user_attr("nan", "nan")
                raise optuna.TrialPruned
            trial.report(self.sign * value, step)
            if start < step < self.length:
                pauses = trial.should_prune()
                assert step in rungs or not pauses
                if step in rungs:
                    self.decisions.append(("pause" if pauses else "train on", number, rungs.index(step)))
                if pauses:
                    trial.set_user_attr(PAUSED_AT, step)
                    raise optuna.TrialPruned
        self.decisions.append(("complete", number, len(rungs)))
        return self.sign * self.curves[number][-1]

    def steps_made(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """How many steps each parameter set has made; one that ended by a NaN has made that step too."""
        made = [0] * len(self.curves)
        for trial in trials:
            made[self.points.index(parameter_set_of(trial))] = (trial.last_step or 0) + ("nan" in trial.user_attrs)
        return made
