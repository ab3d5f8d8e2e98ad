"""What the figures of a study share: labels of trials, many lines as one trace, and samples of very many trials."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from lightning_bge.hpo.analysis.history import History, PastTrial

MAX_SINGLE = 250  # trials up to which each is drawn by itself


def trial_label(trial: PastTrial, history: History) -> str:
    """The text that a figure shows beside a trial under the pointer, as HTML."""
    if trial.value is not None:
        what = f"{history.goal.metric} {trial.value:.4f}"
    else:
        what = f"{trial.outcome} at step {trial.last_step} of {history.steps.total}"
    resumes = "" if trial.resumes is None else f" (resumes trial {trial.resumes})"
    return html.escape(f"trial {trial.number}{resumes}: {what}")


def add_lines(
    fig: go.Figure, xs: Iterable[Sequence[Any]], ys: Iterable[Sequence[Any]], name: str | None = None, **style: Any
) -> None:
    """Add many lines as one trace.

    Args:
        fig: the figure to draw in.
        xs: x values of each line.
        ys: y values of each line.
        name: of the trace in the legend; None: it is not shown there.
        style: further options of the trace.
    """
    x: list[Any] = []
    y: list[Any] = []
    for line_x, line_y in zip(xs, ys, strict=True):
        x += [*line_x, None]
        y += [*line_y, None]
    legend = {"name": name} if name else {"showlegend": False}
    fig.add_scatter(x=x, y=y, mode="lines", hoverinfo="skip", **legend, **style)


def sample_trials(trials: Sequence[PastTrial], name: str) -> tuple[Sequence[PastTrial], str]:
    """An even sample of very many trials, or all of fewer; and a name for the legend with their number."""
    if len(trials) <= 2 * MAX_SINGLE:
        return trials, f"{name} ({len(trials):,})"
    sample = trials[:: -(-len(trials) // MAX_SINGLE)]
    return sample, f"{name} ({len(sample):,} of {len(trials):,})"


def six_digits(value: float | None) -> float:
    """The value with six significant digits, which keeps a page small."""
    return float(f"{value:.6g}")
