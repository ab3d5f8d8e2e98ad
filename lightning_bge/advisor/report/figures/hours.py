"""The figure of a study's hours: those that trials took, and those that pruning saved."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import GREY, GRID
from lightning_bge.advisor.report.figures.style import OUTCOMES, Mark, bar_style, figure, time_unit
from lightning_bge.advisor.report.figures.traces import six_digits
from lightning_bge.hpo.analysis.history import History
from lightning_bge.hpo.analysis.hours import Savings

# outcome -> the part of the hours that its trials belong to; all other trials have no result
KINDS = {"complete": "complete"} | dict.fromkeys(("paused", "resumed", "pruned"), "paused or pruned")


def hours_spent_and_saved(history: History, savings: Savings) -> go.Figure:
    """The hours that trials took, by what became of them, and the hours that pruning saved."""
    spent: defaultdict[str, float] = defaultdict(float)
    for trial in history.trials:
        if trial.start and trial.end:
            spent[KINDS.get(trial.outcome, "no result")] += (trial.end - trial.start).total_seconds() / 3600
    factor, unit = time_unit(savings.spent + savings.saved)
    fig = figure(190, {"title": unit, "showgrid": True}, {"showgrid": False}, barmode="stack", bargap=0.3)
    for name, outcome in (("complete", "complete"), ("paused or pruned", "paused"), ("no result", "failed")):
        if spent[name]:
            _part(fig, "spent", factor * spent[name], name, bar_style(OUTCOMES[outcome]), unit)
    hollow = bar_style(Mark(GRID, "x", "", ""))
    hollow["pattern"]["fgcolor"], hollow["line"] = GREY, {"color": GREY, "width": 1}
    _part(fig, "saved", factor * savings.saved, "saved (estimate)", hollow, unit)
    fig.update_yaxes(autorange="reversed")
    return fig


def _part(fig: go.Figure, row: str, length: float, name: str, marker: dict[str, Any], unit: str) -> None:
    fig.add_bar(
        orientation="h",
        y=[row],
        x=[six_digits(length)],
        name=f"{name}: {length:,.3g} {unit}",
        marker=marker,
        hovertemplate=f"{name}: %{{x:.3g}} {unit}<extra></extra>",
    )
