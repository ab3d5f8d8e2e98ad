"""The style of the figures: marks that differ in symbol, dash and pattern as well as in colour, axes, and units."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import plotly.graph_objects as go

from lightning_bge.advisor.html import theme
from lightning_bge.advisor.html.theme import GRID, INK, MUTED, PAPER


class Mark(NamedTuple):
    """How one kind of trial, or one series, is drawn; it differs from the others without colour too."""

    color: str
    pattern: str
    symbol: str
    dash: str


# by the outcome of a trial
OUTCOMES = {
    "complete": Mark(theme.BLUE, "", "circle", "solid"),
    "paused": Mark(theme.AMBER, "/", "line-ew-open", "dot"),
    "resumed": Mark(theme.TEAL, "-", "triangle-right", "dash"),
    "pruned": Mark(theme.PURPLE, "\\", "x-thin-open", "dot"),
    "diverged": Mark(theme.ROSE, "+", "cross", "dashdot"),
    "out of memory": Mark(theme.RUST, "x", "x", "dashdot"),
    "failed": Mark(theme.BLACK, "", "square", "solid"),
    "interrupted": Mark(theme.GREY, ".", "square-open", "dash"),
    "running": Mark(theme.GREEN, "|", "star", "solid"),
}
# for folds, metrics and other series, in this order
SERIES = (
    Mark(theme.BLUE, "", "circle", "solid"),
    Mark(theme.AMBER, "/", "square", "dash"),
    Mark(theme.TEAL, "\\", "diamond", "dot"),
    Mark(theme.PURPLE, "x", "triangle-up", "dashdot"),
    Mark(theme.RUST, "-", "cross", "longdash"),
    Mark(theme.GREY, ".", "x", "longdashdot"),
)


def series_mark(number: int) -> Mark:
    """The mark of a series, from 0; from the seventh series on the marks repeat."""
    return SERIES[number % len(SERIES)]


def figure(height: int, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, **layout: Any) -> go.Figure:
    """An empty figure in the style of the page.

    Args:
        height: in pixels; the width is that of the page.
        x: options of the x-axis; a title may be a plain text.
        y: options of the y-axis; a title may be a plain text.
        layout: further options of plotly's layout.
    """
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 2},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK}},
            "hovermode": "closest",
            "legend": legend,
            "xaxis": _axis({"showgrid": False} | (x or {})),
            "yaxis": _axis(y or {}),
            **layout,
        }
    )


def _axis(options: dict[str, Any]) -> dict[str, Any]:
    title = {"text": options["title"]} if "title" in options else {}
    return {
        "gridcolor": GRID,
        "linecolor": GRID,
        "tickcolor": GRID,
        "zeroline": False,
        "automargin": True,
        **options,
        "title": {"font": {"color": MUTED}, "standoff": 8, **title},
    }


def integer_ticks(first: int, last: int, most: int = 12) -> dict[str, Any]:
    """Options of an axis of whole numbers with at most so many ticks."""
    least = max(1.0, (last - first + 1) / most)
    power = 10 ** math.floor(math.log10(least))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= least)
    return {"tick0": first if step == 1 else 0, "dtick": step, "tickformat": "d"}


def bar_style(mark: Mark) -> dict[str, Any]:
    """The colour and pattern of a bar."""
    return {
        "color": mark.color,
        "pattern": {"shape": mark.pattern, "fillmode": "overlay", "fgcolor": PAPER, "size": 7, "solidity": 0.25},
        "line": {"color": PAPER, "width": 1},
    }


def time_unit(hours: float) -> tuple[float, str]:
    """The unit for an axis of so many hours, as the number of units in an hour and the unit's name."""
    if hours < 0.05:
        return 3600.0, "seconds"
    return (60.0, "minutes") if hours < 3 else (1.0, "hours")
