"""The figures of a single training run, from what its logger has written."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import counted, figure, series
from lightning_bge.advisor.report.figures.curves import short

Epochs = Sequence[Mapping[str, float]]  # what was logged, by name, an epoch each


def by_epoch(epochs: Epochs, names: Sequence[str], title: str) -> go.Figure:
    """Some of what was logged, by epoch; the first is drawn thicker.

    Args:
        epochs: what was logged; "epoch" counts from 0.
        names: of what is drawn, where it was logged.
        title: of the y-axis.
    """
    x = {"title": "epoch", **counted(1, len(epochs))}
    fig = figure(320, x, {"title": title})
    for number, name in enumerate(names):
        look = series(number)
        there = [epoch for epoch in epochs if name in epoch]
        fig.add_scatter(
            x=[int(epoch["epoch"]) + 1 for epoch in there],
            y=[short(epoch[name]) for epoch in there],
            mode="lines+markers" if len(there) <= 60 else "lines",
            name=html.escape(name),
            line={"color": look.color, "dash": look.dash, "width": 3 if number == 0 else 1.5},
            marker={"symbol": look.symbol, "size": 8},
            hovertemplate=f"{html.escape(name)}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    return fig
