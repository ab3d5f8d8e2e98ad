"""How figures look: colours that colour-blind readers tell apart, each with a symbol, a dash and a pattern besides."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import plotly.graph_objects as go

# Figures are made in the light colours; the page swaps them for the dark ones where the reader's system is dark.
INK, MUTED, GRID, PAPER = "#1b2530", "#596673", "#dfe4e9", "#ffffff"
BLUE, AMBER, TEAL, PURPLE = "#0b63b0", "#a86f00", "#00806a", "#8e4b96"
ROSE, RUST, BLACK, GREY, GREEN = "#b03068", "#c2410c", "#2a333c", "#6c7782", "#3c7d23"
DARK = {
    INK: "#e8edf2",
    MUTED: "#a6b1bc",
    GRID: "#343d47",
    PAPER: "#171c22",
    BLUE: "#6db4f3",
    AMBER: "#e6ae42",
    TEAL: "#45c8ae",
    PURPLE: "#cf96d7",
    ROSE: "#f28bb0",
    RUST: "#fb8c5c",
    BLACK: "#d5dce3",
    GREY: "#95a0ab",
    GREEN: "#88cb6c",
}


class Look(NamedTuple):
    """What tells one kind of mark from the others, on paper and without colour too."""

    color: str
    pattern: str
    symbol: str
    dash: str


OUTCOMES = {
    "complete": Look(BLUE, "", "circle", "solid"),
    "paused": Look(AMBER, "/", "line-ew-open", "dot"),
    "went on": Look(TEAL, "-", "triangle-right", "dash"),
    "pruned": Look(PURPLE, "\\", "x-thin-open", "dot"),
    "diverged": Look(ROSE, "+", "cross", "dashdot"),
    "out of memory": Look(RUST, "x", "x", "dashdot"),
    "failed": Look(BLACK, "", "square", "solid"),
    "interrupted": Look(GREY, ".", "square-open", "dash"),
    "running": Look(GREEN, "|", "star", "solid"),
}
# for folds, metrics and the like, in this order
SERIES = (
    Look(BLUE, "", "circle", "solid"),
    Look(AMBER, "/", "square", "dash"),
    Look(TEAL, "\\", "diamond", "dot"),
    Look(PURPLE, "x", "triangle-up", "dashdot"),
    Look(RUST, "-", "cross", "longdash"),
    Look(GREY, ".", "x", "longdashdot"),
)


def series(number: int) -> Look:
    """The look of the series with this number; from the seventh on they come again."""
    return SERIES[number % len(SERIES)]


def figure(height: int, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, **layout: Any) -> go.Figure:
    """An empty figure as all of them are.

    Args:
        height: in pixels; the width is that of the page.
        x: what is particular about its x-axis.
        y: likewise.
        layout: and about the rest.
    """
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "tickcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"color": MUTED}, "standoff": 8},
    }
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
            "xaxis": merge(axis, {"showgrid": False} | (x or {})),
            "yaxis": merge(axis, y or {}),
            **layout,
        }
    )


def counted(first: int, last: int, most: int = 12) -> dict[str, Any]:
    """An axis of whole numbers with so many ticks at most, none of them between two numbers."""
    least = max(1.0, (last - first + 1) / most)
    power = 10 ** math.floor(math.log10(least))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= least)
    return {"tick0": first if step == 1 else 0, "dtick": step, "tickformat": "d"}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The first with the second's entries; a title's text joins the title's font."""
    found = {**base, **changes}
    if isinstance(changes.get("title"), str):
        found["title"] = {**base["title"], "text": changes["title"]}
    return found


def pattern(look: Look) -> dict[str, Any]:
    """The filling of a bar."""
    return {
        "color": look.color,
        "pattern": {"shape": look.pattern, "fillmode": "overlay", "fgcolor": PAPER, "size": 7, "solidity": 0.25},
        "line": {"color": PAPER, "width": 1},
    }


def time_unit(hours: float) -> tuple[float, str]:
    """How many of which unit an hour has, for an axis of so many hours."""
    if hours < 0.05:
        return 3600.0, "seconds"
    return (60.0, "minutes") if hours < 3 else (1.0, "hours")
