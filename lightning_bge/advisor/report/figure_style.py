"""The style of figures: marks that differ in symbol as well as in colour, axes, units, and traces of trials."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from lightning_bge.advisor.html import theme
from lightning_bge.advisor.html.theme import GRID, INK, MUTED, PAPER
from lightning_bge.advisor.report.format import describe_trial
from lightning_bge.hpo.analysis.history import History, PastTrial

MAX_SINGLE = 250  # trials up to which each is drawn by itself
_AXIS = {"gridcolor": GRID, "linecolor": GRID, "tickcolor": GRID, "zeroline": False, "automargin": True}
_AXIS |= {"title": {"font": {"color": MUTED}, "standoff": 8}}
TEMPLATE = go.layout.Template(
    layout={
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 2},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK}},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": True,
        "xaxis": {**_AXIS, "showgrid": False},
        "yaxis": _AXIS,
    }
)


class Mark(NamedTuple):
    """How one kind of trial, or one series, is drawn; it differs from the others without colour too."""

    color: str
    symbol: str
    dash: str


# by the outcome of a trial
OUTCOME_MARKS = {
    "complete": Mark(theme.BLUE, "circle", "solid"),
    "paused": Mark(theme.AMBER, "triangle-up-open", "dot"),
    "resumed": Mark(theme.TEAL, "triangle-right", "dash"),
    "pruned": Mark(theme.PURPLE, "x-thin-open", "dot"),
    "diverged": Mark(theme.ROSE, "cross", "dashdot"),
    "out of memory": Mark(theme.RUST, "x", "dashdot"),
    "failed": Mark(theme.BLACK, "square", "solid"),
    "interrupted": Mark(theme.GREY, "square-open", "dash"),
    "left out": Mark(theme.BROWN, "circle-open", "dot"),
    "running": Mark(theme.GREEN, "star", "solid"),
}
# for the metrics of a training run, in this order
SERIES = (
    Mark(theme.BLUE, "circle", "solid"),
    Mark(theme.AMBER, "square", "dash"),
    Mark(theme.TEAL, "diamond", "dot"),
    Mark(theme.PURPLE, "triangle-up", "dashdot"),
)


def figure(height: int, x: dict[str, Any], y: dict[str, Any]) -> go.Figure:
    """An empty figure in the style of the page.

    Args:
        height: in pixels; the width is that of the page.
        x: options of the x-axis.
        y: options of the y-axis.
    """
    return go.Figure(layout={"template": TEMPLATE, "height": height, "xaxis": x, "yaxis": y})


def integer_ticks(first: int, last: int, most: int = 12) -> dict[str, Any]:
    """Options of an axis of whole numbers with at most so many ticks."""
    least = max(1.0, (last - first + 1) / most)
    power = 10 ** math.floor(math.log10(least))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= least)
    return {"tick0": first if step == 1 else 0, "dtick": step, "tickformat": "d"}


def time_unit(hours: float) -> tuple[float, str]:
    """The unit for an axis of so many hours, as the number of units in an hour and the unit's name."""
    if hours < 0.05:
        return 3600.0, "seconds"
    return (60.0, "minutes") if hours < 3 else (1.0, "hours")


def rounded(values: Sequence[float | None]) -> list[float]:
    """The values with six significant digits, which keeps a page small."""
    return [float(f"{value:.6g}") for value in values]


def add_lines(fig: go.Figure, curves: Sequence[dict[int, float]], name: str | None = None, **style: Any) -> None:
    """Add many lines as one trace.

    Args:
        fig: the figure to draw in.
        curves: of each line, x -> y.
        name: of the trace in the legend; None: it is not shown there.
        style: further options of the trace.
    """
    x = [one for curve in curves for one in (*curve, None)]
    y = [one for curve in curves for one in (*rounded([*curve.values()]), None)]
    fig.add_scatter(x=x, y=y, mode="lines", hoverinfo="skip", name=name, showlegend=name is not None, **style)


def add_trials(fig: go.Figure, history: History, trials: Sequence[PastTrial], **style: Any) -> None:
    """Add trials as one trace that describes each of them under the pointer.

    Args:
        fig: the figure to draw in.
        history: the study.
        trials: one for each value of `x` and `y`.
        style: further options of the trace, `x` and `y` among them.
    """
    labels = [html.escape(describe_trial(trial, history)) for trial in trials]
    fig.add_scatter(hovertext=labels, hoverinfo="text", **style)


def sample_trials(trials: Sequence[PastTrial], name: str) -> tuple[Sequence[PastTrial], str]:
    """An even sample of very many trials, or all of fewer; and a name for the legend with their number."""
    if len(trials) <= 2 * MAX_SINGLE:
        return trials, f"{name} ({len(trials):,})"
    sample = trials[:: -(-len(trials) // MAX_SINGLE)]
    return sample, f"{name} ({len(sample):,} of {len(trials):,})"
