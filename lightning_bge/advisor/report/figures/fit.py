"""The figures of a single training run, from its logged metrics."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from lightning_bge.advisor.report.figures.style import figure, integer_ticks, series_mark
from lightning_bge.advisor.report.figures.traces import six_digits

Epochs = Sequence[Mapping[str, float]]  # for each epoch, name -> logged value


def by_epoch(epochs: Epochs, names: Sequence[str], title: str) -> go.Figure:
    """Logged metrics by epoch; the first is drawn thicker.

    Args:
        epochs: the logged values of each epoch; "epoch" counts from 0.
        names: of the metrics to draw; epochs without one are left out of its line.
        title: of the y-axis.
    """
    x = {"title": "epoch", **integer_ticks(1, len(epochs))}
    fig = figure(320, x, {"title": title})
    for number, name in enumerate(names):
        mark = series_mark(number)
        there = [epoch for epoch in epochs if name in epoch]
        fig.add_scatter(
            x=[int(epoch["epoch"]) + 1 for epoch in there],
            y=[six_digits(epoch[name]) for epoch in there],
            mode="lines+markers" if len(there) <= 60 else "lines",
            name=html.escape(name),
            line={"color": mark.color, "dash": mark.dash, "width": 3 if number == 0 else 1.5},
            marker={"symbol": mark.symbol, "size": 8},
            hovertemplate=f"{html.escape(name)}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    return fig
