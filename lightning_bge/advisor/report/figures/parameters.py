"""The figures of a study's hyperparameters: their importance, and all trials in parallel coordinates."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, GREY, INK, MUTED, PAPER, RUST
from lightning_bge.advisor.report.figures.style import figure
from lightning_bge.advisor.report.figures.traces import MAX_SINGLE, add_lines, sample_trials, six_digits
from lightning_bge.hpo.analysis.history import History, PastTrial

UNUSED = -0.1  # where the line of a trial passes the axis of a hyperparameter that it does not use
BOLD = 5  # best trials that are drawn with thick lines


def importance(shares: dict[str, float]) -> go.Figure:
    """The importance of each hyperparameter, whose name is above its bar, so that long names fit a narrow page."""
    names = list(shares)[::-1]
    fig = figure(
        60 + 42 * len(names),
        {"range": [0, 1.08 * max(shares.values())], "tickformat": ".0%", "showgrid": True, "nticks": 6},
        {"showticklabels": False, "showgrid": False, "range": [-0.6, len(names) - 0.3]},
        showlegend=False,
    )
    fig.add_bar(
        orientation="h",
        x=[shares[name] for name in names],
        y=list(range(len(names))),
        width=0.34,
        marker={"color": BLUE},
        hoverinfo="skip",
    )
    for row, name in enumerate(names):
        text = f"{html.escape(name)}  <b>{shares[name]:.1%}</b>"
        fig.add_annotation(
            x=0, xanchor="left", y=row + 0.2, yanchor="bottom", text=text, showarrow=False, font={"color": INK}
        )
    return fig


@dataclass(frozen=True)
class Axis:
    """One hyperparameter, or the score, as an axis from 0 to 1.

    Attributes:
        name: of the hyperparameter, or of the metric.
        ticks: position and label of each tick.
        spec: the distribution, as plain data.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]
    spec: Mapping[str, Any]

    def place(self, value: Any, number: int) -> float:
        """The position of a trial's value. Trials of the same choice are spread a little, by the trial's number."""
        if "choices" in self.spec:
            choices = self.spec["choices"]
            spread = (number * 0.618034) % 1 - 0.5
            return (choices.index(value) + 0.5 + 0.5 * spread) / len(choices)
        low, high = (self.scaled(self.spec[end]) for end in ("low", "high"))
        return (self.scaled(value) - low) / (high - low) if high > low else 0.5

    def scaled(self, value: float) -> float:
        """The value, or its logarithm on a logarithmic axis."""
        return math.log10(value) if self.spec.get("log") else float(value)


def _axis(name: str, spec: Mapping[str, Any]) -> Axis:
    if "choices" in spec:
        choices = spec["choices"]
        longest = max(5, 48 // len(choices))
        texts = [str(choice) if len(str(choice)) <= longest else f"…{str(choice)[1 - longest :]}" for choice in choices]
        return Axis(name, tuple(((i + 0.5) / len(choices), text) for i, text in enumerate(texts)), spec)
    axis = Axis(name, (), spec)
    low, high = axis.scaled(spec["low"]), axis.scaled(spec["high"])
    values = [spec["low"], spec["high"]]
    if spec.get("log"):
        values += [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    elif high > low:
        values.append((spec["low"] + spec["high"]) / 2)
    places = sorted({(axis.place(value, 0), f"{value:.4g}") for value in values})
    return Axis(name, tuple(places), spec)


def parallel(history: History) -> go.Figure:
    """Parallel coordinates: each trial is a line across the axes of its hyperparameters, down to its score."""
    done = history.ranked
    axes = [_axis(name, spec["attributes"]) for name, spec in history.space.items()]
    if done:
        ends = sorted((done[0].value or 0.0, done[-1].value or 0.0))
        axes.append(_axis(history.goal.metric, {"low": ends[0], "high": ends[1]}))
    conditional = {name for name, spec in history.space.items() if "when" in spec}
    row = 62
    fig = figure(
        80 + row * len(axes),
        {"range": [-0.15 if conditional else -0.03, 1.03], "visible": False},
        {"range": [-len(axes) + 0.3, 0.55], "visible": False},
    )
    quarter = max(BOLD, len(done) // 4)
    groups = [
        (ended_early(history), "ended early", {"color": GREY, "width": 1, "dash": "dot"}),
        (done[quarter:], "other complete trials", {"color": GREY, "width": 0.8}),
        (done[BOLD:quarter], "best quarter", {"color": BLUE, "width": 1.2}),
        (done[:BOLD], "best", {"color": RUST, "width": 2.5}),
    ]
    for trials, name, line in groups:
        if trials:
            drawn, label = sample_trials(trials, name)
            xs, ys = zip(*(_line(axes, trial, history.goal.metric) for trial in drawn), strict=True)
            add_lines(fig, xs, ys, name=label, line=line, opacity=1.0 if name == "best" else 0.6)
    _draw_axes(fig, axes, conditional)
    return fig


def ended_early(history: History) -> list[PastTrial]:
    """The trials that were ended early and are drawn: none where so many would hide the complete ones."""
    early = [trial for trial in history.trials if trial.params and trial.outcome in ("paused", "pruned", "diverged")]
    return early if len(early) <= MAX_SINGLE or not history.ranked else []


def _line(axes: Sequence[Axis], trial: PastTrial, metric: str) -> tuple[list[float], list[float]]:
    """The line of a trial; it passes left of the axis of a hyperparameter that the trial does not use."""
    x, y = [], []
    for row, axis in enumerate(axes):
        if axis.name in trial.params:
            x.append(six_digits(axis.place(trial.params[axis.name], trial.number)))
        elif axis.name == metric and trial.value is not None:
            x.append(six_digits(axis.place(trial.value, trial.number)))
        elif axis.name == metric:
            break
        else:
            x.append(UNUSED)
        y.append(-float(row))
    return x, y


def _draw_axes(fig: go.Figure, axes: Sequence[Axis], conditional: set[str]) -> None:
    for row, axis in enumerate(axes):
        y = -row
        fig.add_shape(type="line", x0=0, x1=1, y0=y, y1=y, line={"color": MUTED, "width": 1.5})
        text = {"showarrow": False, "bgcolor": PAPER, "borderpad": 1, "opacity": 0.9}
        fig.add_annotation(
            **text, x=0, xanchor="left", y=y, yanchor="bottom", yshift=5, text=f"<b>{html.escape(axis.name)}</b>"
        )
        ticks = [(UNUSED, "none"), *axis.ticks] if axis.name in conditional else axis.ticks
        for x, label in ticks:
            fig.add_shape(type="line", x0=x, x1=x, y0=y - 0.06, y1=y + 0.06, line={"color": MUTED, "width": 1.5})
            fig.add_annotation(
                **text,
                x=x,
                xanchor="left" if x == 0 else "right" if x == 1 else "center",
                y=y,
                yanchor="top",
                yshift=-4,
                text=html.escape(label),
                font={"color": MUTED, "size": 11},
            )
