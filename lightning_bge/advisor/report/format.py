"""Figures in words, for a page and for a terminal alike."""

from __future__ import annotations

from lightning_bge.advisor.report.run_data import RunFolder
from lightning_bge.hpo.analysis.history import History

ORDER = (
    *("complete", "paused", "went on", "pruned", "diverged", "out of memory"),
    *("failed", "interrupted", "running", "waiting"),
)
MEANS = {
    "complete": "complete: ran to their end",
    "paused": "paused: ended early, and may still be resumed",
    "went on": "went on: paused, and resumed as another trial",
    "pruned": "pruned: ended early for good",
    "diverged": "diverged: the metric was not a number",
    "out of memory": "out of memory: did not fit, whatever was tried",
    "failed": "failed: ended by an error",
    "interrupted": "interrupted: their process was stopped or died",
    "running": "running",
    "waiting": "waiting to be run",
}


def duration(hours: float) -> str:
    """A time in the unit that suits it."""
    if hours < 1.5 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1.5:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def figure_text(value: float) -> str:
    """A number with three figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def outcome_counts(history: History) -> list[tuple[str, int]]:
    """How many trials ended how, in words; those that are not there are left out."""
    counts = history.counts
    return [(MEANS[outcome], counts[outcome]) for outcome in ORDER if counts[outcome]]


def what_is_searched(history: History) -> str:
    """What a trial is, and what it is judged by."""
    steps = history.steps
    split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
    text = f"{split}, at most {steps.epochs} epochs each; judged by {history.metric} of the {history.objective} epoch"
    text += f" and by {history.cost}" if history.cost else ""
    return text + (f"; pruner {history.pruner}" if history.pruner else "")


def state_of(run: RunFolder) -> str:
    """Whether it is finished, running, or cut off."""
    if run.finished:
        return "finished"
    if run.history is not None:
        if run.history.going_on:
            again = sum(trial.outcome == "running" for trial in run.history.seed_replicates)
            running = run.history.counts["running"]
            return f"running, {running} at once" if running else f"running {again} repeats of the best trials"
        if run.trials_done:
            return "its trials are done; what follows is at work, or was cut off: then the same command goes on with it"
        return "not finished, and no trial is running: the same command goes on with it"
    if run.is_study:
        return "just begun"
    return "not finished: running, or cut off; the same command goes on with it"
