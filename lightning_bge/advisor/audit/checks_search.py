"""What an audit says of a search: whether its pruner can act, what it saves, and whether all folds report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from lightning_bge.advisor.audit.checks_compute import Gain, Row
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.preview import describe_pruner, forecast
from lightning_bge.hpo.objective_probe import watch_objective, would_prune
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps


def search_rows(hpo: StudyConfig, steps: Steps) -> list[Row]:
    """The rows of a search with our own objective."""
    return [pruner_row(hpo, steps), *_intents(hpo, steps)]


def pruner_row(hpo: StudyConfig, steps: Steps) -> Row:
    """Whether the pruner can end a trial early, and about what that saves."""
    row = Row("search", "pruning", hpo.pruner.name, "", "ok", "")
    try:
        found = forecast(hpo.pruner, hpo.n_trials, steps)
    except ConfigError as error:
        return replace(row, in_effect="never", verdict="lie", evidence=str(error), effort="one setting")
    best = forecast(PrunerConfig(), hpo.n_trials, steps)
    if found.first is None:
        return replace(
            row,
            in_effect="none",
            verdict="off",
            evidence="every trial runs to its end",
            gain=_simulated(1 - best.cost),
            advice="prune",
            accuracy="bad trials end early; docs/search.md has the regret measured",
            effort="one line",
            yaml="hpo.pruner: {name: asha}",
        )
    text = describe_pruner(hpo.pruner, hpo.n_trials, steps).replace("\n", "; ")
    row = replace(row, in_effect=f"from step {found.first} of {steps.total}", evidence=text)
    row = replace(row, gain=_simulated(1 - found.cost))
    if hpo.pruner.name == "hyperband" and hpo.pruner.patience is not None:
        advice = "with patience around hyperband a trial that still improves is never pruned: use asha"
        return replace(row, verdict="off", advice=advice, effort="one line", yaml="hpo.pruner: {name: asha}")
    return row


def _simulated(saved: float) -> Gain:
    # the simulation is rough: docs/search.md tells how far it was from real searches
    low, high = max(0.0, saved - 0.15), min(1.0, saved + 0.15)
    return Gain(low, saved, high, "predicted", f"of the search's training, {saved:.0%}, on simulated learning curves")


def _intents(hpo: StudyConfig, steps: Steps) -> list[Row]:
    folds = f"{steps.folds} folds" if steps.folds > 1 else "a single split"
    row = Row("search", "fold-level pruning", folds, "", "not applicable", "a single split has no folds")
    if steps.folds > 1:
        text = f"one curve of reports 1 to {steps.total} over {steps.folds} folds of {steps.per_fold}"
        row = replace(row, in_effect="within and between folds", verdict="ok", evidence=text)
    return [row]


def objective_rows(
    objective: Callable[[Any], Any],
    pruner: Any,
    trials: int,
    folds: int | None = None,
    direction: Literal["maximize", "minimize"] = "maximize",
) -> list[Row]:
    """Run one trial of anybody's Optuna objective: do all folds report, and can the pruner ever act on that?

    Args:
        objective: takes an Optuna trial, trains with Lightning, and returns a value.
        pruner: an Optuna pruner; it is not changed.
        trials: of the study that is planned.
        folds: that a trial trains; None: as many as it fits trainers.
        direction: of the study.
    """
    seen = watch_objective(objective, direction=direction)
    ended = would_prune(pruner, seen.steps, trials, direction) if seen.steps else 0
    name = type(pruner).__name__
    row = Row("search", "pruning", name, f"{ended} of a simulated study's trials", "ok", "")
    text = f"one trial reported {len(seen.steps)} steps ({_span(seen.steps)}) and asked {seen.asked} times"
    row = replace(row, evidence=f"{text}; of simulated trials that report so, half of them hopeless, it ends {ended}")
    if not ended or not seen.asked:
        row = replace(
            row,
            in_effect="never",
            verdict="lie",
            advice="report after each epoch of each fold, at steps 1, 2, ..., and ask should_prune(); set rungs in "
            "those steps: our FoldPruningCallback reports so",
            effort="one callback",
        )
    return [row, _folds_row(seen, folds)]


def _folds_row(seen: Any, folds: int | None) -> Row:
    count = seen.fits if folds is None else folds
    kept = {report.fit for report in seen.reports if report.kept}
    lost = sum(not report.kept for report in seen.reports)
    row = Row("search", "fold-level pruning", f"{count} folds", f"{len(kept)} of them report", "ok", "")
    row = replace(row, evidence=f"{len(seen.reports)} reports from {seen.fits} fits, {lost} ignored as repeated steps")
    if count <= 1 or len(kept) >= count:
        return row if count > 1 else replace(row, verdict="not applicable")
    return replace(
        row,
        verdict="lie",
        advice="count steps on over the folds: fold * epochs + epoch + 1; our FoldPruningCallback does",
        accuracy="later folds can't end a trial",
        effort="one callback",
    )


def _span(steps: list[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "none"
