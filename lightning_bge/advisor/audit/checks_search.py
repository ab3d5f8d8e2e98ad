"""Rows about a hyperparameter search: whether its pruner can act, what it saves, and whether all folds report."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_bge.advisor.audit.result import Fix, Row, TimeSaved
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.preview import describe_pruner, forecast
from lightning_bge.hpo.objective_probe import Direction, observe_objective, would_prune
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps

# Half of the interval of a forecast, which rests on simulated learning curves: docs/search.md has its measured error.
FORECAST_ERROR = 0.15


def search_rows(hpo: StudyConfig, steps: Steps) -> list[Row]:
    """Pruning and fold-level pruning of a search by `lightning-bge hpo`."""
    return [pruning(hpo, steps), _configured_folds(steps)]


def pruning(hpo: StudyConfig, steps: Steps) -> Row:
    """Whether the pruner can end a trial early, and about what that saves."""
    row = Row("search", "pruning", hpo.pruner.name)
    use_default = Fix(
        "use the default pruner",
        effort="one line",
        accuracy="bad trials end early; docs/search.md has the regret that was measured",
        yaml="hpo.pruner: {name: asha}",
    )
    try:
        found = forecast(hpo.pruner, hpo.n_trials, steps)
    except ConfigError as error:
        return replace(row, in_effect="never", verdict="mismatch", evidence=str(error), fix=use_default)
    if found.first is None:
        saved = _forecast_saving(forecast(PrunerConfig(), hpo.n_trials, steps).cost)
        evidence = "every trial runs to its end"
        return replace(row, in_effect="none", verdict="improve", evidence=evidence, time_saved=saved, fix=use_default)
    text = describe_pruner(hpo.pruner, hpo.n_trials, steps).replace("\n", "; ")
    row = replace(row, in_effect=f"from step {found.first} of {steps.total}", evidence=text)
    row = replace(row, time_saved=_forecast_saving(found.cost))
    if hpo.pruner.name == "hyperband" and hpo.pruner.patience is not None:
        text = "with patience around hyperband a trial that still improves is never pruned: use the default pruner"
        return replace(row, verdict="improve", fix=replace(use_default, text=text))
    return row


def _forecast_saving(cost: float) -> TimeSaved:
    saved = 1 - cost
    low, high = max(0.0, saved - FORECAST_ERROR), min(1.0, saved + FORECAST_ERROR)
    text = f"{saved:.0%} of the search's training, on simulated learning curves"
    return TimeSaved(low, saved, high, "predicted", text)


def _configured_folds(steps: Steps) -> Row:
    if steps.folds == 1:
        evidence = "a single split has no folds"
        return Row("search", "fold-level pruning", "a single split", "no folds", "not applicable", evidence)
    evidence = f"one learning curve of steps 1 to {steps.total}, {steps.per_fold} in each of {steps.folds} folds"
    return Row("search", "fold-level pruning", f"{steps.folds} folds", "within and between folds", "ok", evidence)


# ---------------------------------------------------------------------- any objective of Optuna


def audit_objective(
    objective: Callable[[Any], Any],
    pruner: Any,
    n_trials: int,
    folds: int | None = None,
    direction: Direction = "maximize",
) -> list[Row]:
    """Run one trial of any Optuna objective: do all folds report, and can the pruner ever act on what they report?

    Args:
        objective: takes an Optuna trial, trains with Lightning, and returns a value.
        pruner: an Optuna pruner; it is not changed.
        n_trials: of the planned study.
        folds: that a trial trains; None: the number of calls of `Trainer.fit`.
        direction: of the study.
    """
    trial = observe_objective(objective, direction)
    steps = [step for _, step, kept in trial.reports if kept]
    ended = would_prune(pruner, steps, n_trials, direction) if steps else 0
    evidence = (
        f"one trial reported {len(steps)} steps ({f'{steps[0]} to {steps[-1]}' if steps else 'none'}) and called "
        f"should_prune {trial.prune_calls} times; of simulated trials that report the same steps, half of which learn "
        f"nothing, the pruner ends {ended}"
    )
    acts = f"{ended} trials of a simulated study"
    pruning = Row("search", "pruning", type(pruner).__name__, acts, "ok", evidence)
    if not ended or not trial.prune_calls:
        text = (
            "report after each epoch of each fold, at steps 1, 2, ..., and call should_prune(); give the pruner its "
            "rungs in those steps: FoldPruningCallback reports this way"
        )
        pruning = replace(pruning, in_effect="never", verdict="mismatch", fix=Fix(text, "one callback"))
    return [pruning, _reporting_folds(trial.reports, trial.fits, trial.fits if folds is None else folds)]


def _reporting_folds(reports: list[tuple[int, int, bool]], fits: int, folds: int) -> Row:
    reporting = {fit for fit, _, kept in reports if kept}
    repeated = sum(not kept for *_, kept in reports)
    evidence = f"{len(reports)} reports from {fits} calls of fit, {repeated} ignored as repeated steps"
    row = Row("search", "fold-level pruning", f"{folds} folds", f"{len(reporting)} of them report", "ok", evidence)
    if folds <= 1:
        return replace(row, verdict="not applicable")
    if len(reporting) >= folds:
        return row
    text = "count steps over all folds: fold * epochs + epoch + 1; FoldPruningCallback does"
    return replace(row, verdict="mismatch", fix=Fix(text, "one callback", "later folds cannot end a trial"))
