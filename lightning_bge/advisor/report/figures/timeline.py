"""The timeline of a study: when each trial ran, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import plotly.graph_objects as go

from lightning_bge.advisor.report.figures.style import OUTCOMES, Mark, bar_style, figure, integer_ticks
from lightning_bge.advisor.report.figures.traces import MAX_SINGLE, trial_label
from lightning_bge.hpo.analysis.history import History, PastTrial

DATES = {"type": "date", "nticks": 4, "tickangle": 0, "showgrid": True}


def timeline(history: History) -> go.Figure:
    """When each trial ran and how it ended.

    Up to `MAX_SINGLE` trials have a bar each, one below the other; more trials share a lane for each outcome.
    """
    started = [trial for trial in history.trials if trial.start and (trial.end or trial.outcome == "running")]
    groups = [(outcome, [trial for trial in started if trial.outcome == outcome]) for outcome in OUTCOMES]
    groups = [(outcome, trials) for outcome, trials in groups if trials]
    if len(history.trials) > MAX_SINGLE:
        return _lanes(history, groups)
    y = {"title": "trial", "autorange": "reversed", "showgrid": False, **integer_ticks(0, len(history.trials))}
    fig = figure(160 + min(max(16 * len(history.trials), 140), 480), DATES, y, barmode="overlay")
    for outcome, trials in groups:
        _bars(fig, history, trials, OUTCOMES[outcome], f"{outcome} ({len(trials):,})")
    return fig


def _bars(fig: go.Figure, history: History, trials: Sequence[PastTrial], mark: Mark, name: str) -> None:
    spans = [_span(trial, history) for trial in trials]
    fig.add_bar(
        orientation="h",
        base=[start for start, _ in spans],
        x=[end - start for start, end in spans],
        y=[trial.number for trial in trials],
        width=0.75,
        name=name,
        marker=bar_style(mark),
        hovertext=[trial_label(trial, history) for trial in trials],
        hoverinfo="text",
    )


def _lanes(history: History, groups: Sequence[tuple[str, Sequence[PastTrial]]]) -> go.Figure:
    y = {"range": [-len(groups) + 0.4, 0.75], "visible": False}
    fig = figure(50 + 46 * len(groups), DATES, y, showlegend=False)
    spans = {outcome: [_span(trial, history) for trial in trials] for outcome, trials in groups}
    moments = [moment for group in spans.values() for span in group for moment in span]
    least = (max(moments) - min(moments)) / 700  # about a pixel
    for row, (outcome, trials) in enumerate(groups):
        corners_x: list[float | None] = []
        for start, end in spans[outcome]:
            stop = max(end, start + least)
            corners_x += [start, stop, stop, start, None]
        corners_y = [-row - 0.22, -row - 0.22, -row + 0.22, -row + 0.22, None] * len(trials)
        # all trials of a lane are one shape: thousands of bars would take seconds to draw
        color = OUTCOMES[outcome].color
        fig.add_scatter(x=corners_x, y=corners_y, mode="none", fill="toself", fillcolor=color, hoverinfo="skip")
        fig.add_annotation(
            x=0,
            xref="paper",
            xanchor="left",
            y=-row + 0.22,
            yanchor="bottom",
            showarrow=False,
            text=f"{outcome} ({len(trials):,})",
        )
    return fig


def _span(trial: PastTrial, history: History) -> tuple[int, int]:
    """Start and end of a trial in milliseconds; a running trial ends now."""
    assert trial.start is not None
    return _ms(trial.start), _ms(trial.end or history.read_at)


def _ms(moment: datetime) -> int:
    """Local time in milliseconds, as a date axis without time zones takes it."""
    return round((moment - datetime(1970, 1, 1)).total_seconds() * 1000)
