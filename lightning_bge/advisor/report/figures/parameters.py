"""The figures of a study's settings and scores, a function each."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, GREY, INK, MUTED, PAPER, RUST, figure, series
from lightning_bge.advisor.report.figures.curves import BARS, joined, short, some, told
from lightning_bge.hpo.analysis.history import History, PastTrial

SHOWN = 10  # trials whose folds are shown
UNUSED = -0.1  # where a trial crosses the axis of a setting that it has not drawn
BOLD = 5  # best trials that stand out among the others


def importance(shares: dict[str, float]) -> go.Figure:
    """Each setting's share; its name stands above its bar, so that long ones fit a narrow page."""
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


def fold_scores(history: History) -> go.Figure:
    """The best trials' scores in each fold, their mean, and the spread between the folds."""
    best = [trial for trial in history.ranked if trial.fold_scores][:SHOWN]
    names = [f"trial {trial.number}" for trial in best]
    fig = figure(110 + 34 * len(best), {"title": html.escape(history.metric), "showgrid": True}, {"showgrid": True})
    for fold in range(history.steps.folds):
        look = series(fold)
        fig.add_scatter(
            x=[short(trial.fold_scores[fold]) for trial in best],
            y=names,
            mode="markers",
            name=f"fold {fold + 1}",
            marker={"symbol": f"{look.symbol}-open", "color": look.color, "size": 9, "line": {"width": 2}},
            hovertemplate=f"%{{y}}, fold {fold + 1}: %{{x:.4f}}<extra></extra>",
        )
    fig.add_scatter(
        x=[short(float(np.mean(trial.fold_scores))) for trial in best],
        y=names,
        mode="markers",
        name="mean ± standard deviation",
        marker={"symbol": "line-ns", "color": INK, "size": 15, "line": {"color": INK, "width": 3}},
        error_x={
            "array": [short(float(np.std(trial.fold_scores, ddof=1))) for trial in best],
            "color": INK,
            "thickness": 1.5,
            "width": 4,
        },
        hovertemplate="%{y}: mean %{x:.4f}<extra></extra>",
    )
    fig.update_yaxes(autorange="reversed")
    return fig


def front(history: History) -> go.Figure:
    """Score against cost, and the trials that no other beats in both."""
    fig = figure(360, {"title": f"{html.escape(str(history.cost))}, seconds"}, {"title": html.escape(history.metric)})
    done = history.ranked
    best: list[PastTrial] = []
    for trial in done:  # the best score first, so that only a lower cost keeps a trial in
        if not best or (trial.cost or 0.0) < (best[-1].cost or 0.0):
            best.append(trial)
    beaten, label = some([trial for trial in done if trial not in best], "others")
    groups = [
        (beaten, label, "markers", "circle-open", MUTED),
        (best, f"front ({len(best):,})", "lines+markers", "diamond", RUST),
    ]
    for trials, name, mode, symbol, color in groups:
        fig.add_scatter(
            x=[short(trial.cost) for trial in trials],
            y=[short(trial.value) for trial in trials],
            mode=mode,
            name=name,
            line={"shape": "hv", "color": color},
            marker={"symbol": symbol, "size": 8, "color": color},
            hovertext=[told(trial, history) for trial in trials],
            hoverinfo="text",
        )
    return fig


# ---------------------------------------------------------------------- parallel coordinates


@dataclass(frozen=True)
class Axis:
    """One setting as a line from 0 to 1.

    Attributes:
        name: of the setting.
        ticks: what stands where.
        spec: the distribution, as plain data; empty for the score.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]
    spec: Mapping[str, Any]

    def place(self, value: Any, number: int) -> float:
        """Where a value lies. Trials of the same choice are spread a little, each always by the same."""
        if "choices" in self.spec:
            choices = self.spec["choices"]
            spread = (number * 0.618034) % 1 - 0.5
            return (choices.index(value) + 0.5 + 0.5 * spread) / len(choices)
        low, high = (self.scaled(self.spec[end]) for end in ("low", "high"))
        return (self.scaled(value) - low) / (high - low) if high > low else 0.5

    def scaled(self, value: float) -> float:
        """On a logarithmic axis its logarithm."""
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
    """Each trial as a line down through its settings to its score: the settings' axes lie one below the other."""
    done = history.ranked
    axes = [_axis(name, spec["attributes"]) for name, spec in history.space.items()]
    if done:
        ends = sorted((done[0].value or 0.0, done[-1].value or 0.0))
        axes.append(_axis(history.metric, {"low": ends[0], "high": ends[1]}))
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
        (done[quarter:], "others that ran to the end", {"color": GREY, "width": 0.8}),
        (done[BOLD:quarter], "best quarter of them", {"color": BLUE, "width": 1.2}),
        (done[:BOLD], "best", {"color": RUST, "width": 2.5}),
    ]
    for trials, name, line in groups:
        if trials:
            drawn, label = some(trials, name)
            xs, ys = zip(*(_way(axes, trial, history.metric) for trial in drawn), strict=True)
            joined(fig, xs, ys, name=label, line=line, opacity=1.0 if name == "best" else 0.6)
    _draw_axes(fig, axes, conditional)
    return fig


def ended_early(history: History) -> list[PastTrial]:
    """Those that are drawn: none where they would hide the others."""
    early = [trial for trial in history.trials if trial.params and trial.outcome in ("paused", "pruned", "diverged")]
    return early if len(early) <= BARS or not history.ranked else []


def _way(axes: Sequence[Axis], trial: PastTrial, metric: str) -> tuple[list[float], list[float]]:
    """The points of a trial's line. A setting that it has not drawn lies left of that axis."""
    x, y = [], []
    for row, axis in enumerate(axes):
        if axis.name in trial.params:
            x.append(short(axis.place(trial.params[axis.name], trial.number)))
        elif axis.name == metric and trial.value is not None:
            x.append(short(axis.place(trial.value, trial.number)))
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
