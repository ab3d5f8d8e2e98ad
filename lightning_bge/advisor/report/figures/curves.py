"""The learning curves of a study and where they ended, and what all figures share."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, GRID, MUTED, OUTCOMES, RUST, Look, counted, figure, pattern
from lightning_bge.hpo.analysis.history import History, PastTrial

BARS = 250  # trials up to which each is drawn by itself
EARLY = ("paused", "pruned", "diverged", "out of memory")


def learning_curves(history: History) -> go.Figure:
    """What trials reported; those that were ended early fade out where they ended."""
    fig = figure(400, {"title": _reports_title(history)}, {"title": html.escape(history.metric)})
    curves = [(trial, _curve(trial)) for trial in history.trials if trial.outcome not in ("went on", "waiting")]
    curves = [(trial, curve) for trial, curve in curves if curve]
    early = [(trial, curve) for trial, curve in curves if trial.outcome in EARLY]
    best = history.best
    done = [curve for trial, curve in curves if trial.outcome == "complete" and trial is not best]
    if len(history.trials) > BARS:
        _band(fig, [curve for _, curve in early], "ended early", OUTCOMES["paused"])
        _band(fig, done, "ran to the end", OUTCOMES["complete"]._replace(pattern="\\", dash="dot"))
    else:
        _fading(fig, history, early)
        if done:
            name = f"ran to the end ({len(done):,})"
            joined(fig, *_lines(done), name=name, line={"color": BLUE, "width": 1.2}, opacity=0.6)
    if running := [curve for trial, curve in curves if trial.outcome == "running"]:
        joined(fig, *_lines(running), name="running", line={"color": OUTCOMES["running"].color, "dash": "dash"})
    if best is not None and (curve := _curve(best)):
        x, y = _lines([curve])
        name = f"best: trial {best.number}"
        fig.add_scatter(
            x=x[0],
            y=y[0],
            name=name,
            mode="lines+markers",
            line={"color": RUST, "width": 3},
            marker={"symbol": "diamond", "size": 7},
            hovertemplate=f"{name}, report %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    _mark_folds(fig, history)
    return fig


def _curve(trial: PastTrial) -> dict[int, float]:
    """Its reports; where nothing is reported, as a cost is minimised too, each fold's own validations."""
    found = trial.reports or {one.step: one.value for fold in trial.curve for one in fold}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _lines(curves: Sequence[dict[int, float]]) -> tuple[list[list[int]], list[list[float]]]:
    return [list(curve) for curve in curves], [[short(value) for value in curve.values()] for curve in curves]


def _fading(fig: go.Figure, history: History, early: Sequence[tuple[PastTrial, dict[int, float]]]) -> None:
    for outcome in EARLY:
        group = [(trial, curve) for trial, curve in early if trial.outcome == outcome]
        if not group:
            continue
        look, (xs, ys) = OUTCOMES[outcome], _lines([curve for _, curve in group])
        line = {"color": look.color, "width": 1.5}
        joined(fig, [x[:-1] for x in xs], [y[:-1] for y in ys], line=line, opacity=0.55)
        joined(fig, [x[-2:] for x in xs], [y[-2:] for y in ys], line={**line, "dash": "dot"}, opacity=0.3)
        fig.add_scatter(
            x=[x[-1] for x in xs],
            y=[y[-1] for y in ys],
            mode="markers",
            name=f"{outcome} ({len(group):,})",
            opacity=0.75,
            marker={"symbol": look.symbol, "color": look.color, "size": 7, "line": {"color": look.color, "width": 1.5}},
            hovertext=[told(trial, history) for trial, _ in group],
            hoverinfo="text",
        )


def _band(fig: go.Figure, curves: Sequence[dict[int, float]], name: str, look: Look) -> None:
    """The middle of many curves, as far as at least ten of them go."""
    steps = [step for step in sorted({s for curve in curves for s in curve}) if sum(step in c for c in curves) >= 10]
    if not steps:
        return
    table = [np.quantile([curve[step] for curve in curves if step in curve], (0.1, 0.5, 0.9)) for step in steps]
    low, middle, high = ([short(float(row[i])) for row in table] for i in range(3))
    edge = {"x": steps, "mode": "lines", "line": {"width": 0.7, "color": look.color}, "hoverinfo": "skip"}
    fill = {"shape": look.pattern, "fgcolor": look.color, "bgcolor": "rgba(0,0,0,0)", "size": 6, "solidity": 0.12}
    fig.add_scatter(**edge, y=low, showlegend=False)
    fig.add_scatter(**edge, y=high, fill="tonexty", fillpattern=fill, name=f"{name} ({len(curves):,}), middle 80 %")
    fig.add_scatter(
        x=steps,
        y=middle,
        mode="lines+markers",
        line={"color": look.color, "width": 2, "dash": look.dash},
        marker={"symbol": look.symbol, "size": 7},
        showlegend=False,
        hovertemplate=f"median of those that {name}, report %{{x}}: %{{y:.4f}}<extra></extra>",
    )


def _reports_title(history: History) -> str:
    steps = history.steps
    parts = [f"{steps.folds} folds" if steps.folds > 1 else "", f"{steps.epochs} epochs"]
    parts += [f"{steps.per_epoch} reports"] if steps.per_epoch > 1 else []
    return f"report ({' x '.join(part for part in parts if part)})"


def _mark_folds(fig: go.Figure, history: History, height: int = 0) -> None:
    """Lines between the folds, and their names at the bottom (0) or at the top (1)."""
    folds, width = history.steps.folds, history.steps.per_fold
    fig.update_xaxes(range=[0.5, history.steps.total + 0.5], **counted(1, history.steps.total))
    for fold in range(folds if folds > 1 else 0):
        if fold:
            fig.add_vline(fold * width + 0.5, line={"color": GRID, "width": 1, "dash": "dash"}, layer="below")
        text = f"fold {fold + 1}" if folds <= 5 else str(fold + 1)
        fig.add_annotation(
            x=(fold + 0.5) * width + 0.5,
            y=height,
            yref="paper",
            yanchor="top" if height else "bottom",
            text=text,
            showarrow=False,
            font={"color": MUTED, "size": 11},
        )


def where_ended(history: History) -> go.Figure:
    """How many trials ended at which report."""
    fig = figure(280, {"title": _reports_title(history)}, {"title": "trials"}, barmode="stack", bargap=0.15)
    for outcome in (*EARLY, "complete"):
        trials = [trial for trial in history.trials if trial.outcome == outcome]
        if trials:
            total = history.steps.total
            at = Counter(total if outcome == "complete" else trial.last_report for trial in trials)
            fig.add_bar(
                x=list(at),
                y=list(at.values()),
                width=0.8,
                name=f"{outcome} ({len(trials):,})",
                marker=pattern(OUTCOMES[outcome]),
                hovertemplate=f"{outcome} at report %{{x}}: %{{y}}<extra></extra>",
            )
    heights: Counter[int] = Counter()
    for bar in fig.data:
        heights.update(dict(zip(bar.x, bar.y, strict=True)))
    fig.add_scatter(
        x=list(heights),
        y=list(heights.values()),
        text=[f"{height:,}" for height in heights.values()],
        mode="text",
        textposition="top center",
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
    )
    _mark_folds(fig, history, height=1)
    # report 0: ended before the first one; and room for the folds' names above the bars
    fig.update_xaxes(range=[min([1, *heights]) - 0.5, history.steps.total + 0.5])
    fig.update_yaxes(range=[0, 1.25 * max(heights.values(), default=1)])
    return fig


# ---------------------------------------------------------------------- shared


def told(trial: PastTrial, history: History) -> str:
    """A trial in a line."""
    if trial.outcome == "complete":
        what = f"{history.metric} {trial.value:.4f}"
    else:
        what = f"{trial.outcome} at report {trial.last_report} of {history.steps.total}"
    goes_on = "" if trial.continues is None else f" (goes on with {trial.continues})"
    return html.escape(f"trial {trial.number}{goes_on}: {what}")


def joined(
    fig: go.Figure, xs: Iterable[Sequence[Any]], ys: Iterable[Sequence[Any]], name: str | None = None, **how: Any
) -> None:
    """Many lines as one trace."""
    x: list[Any] = []
    y: list[Any] = []
    for one, other in zip(xs, ys, strict=True):
        x += [*one, None]
        y += [*other, None]
    more = {"name": name, "hoverinfo": "skip"} if name else {"showlegend": False, "hoverinfo": "skip"}
    fig.add_scatter(x=x, y=y, mode="lines", **{**more, **how})


def some(trials: Sequence[PastTrial], name: str) -> tuple[Sequence[PastTrial], str]:
    """Of very many trials some, evenly among them, and how many these are."""
    if len(trials) <= 2 * BARS:
        return trials, f"{name} ({len(trials):,})"
    every = -(-len(trials) // BARS)
    return trials[::every], f"{name} ({len(trials[::every]):,} of {len(trials):,})"


def short(value: float | None) -> float:
    """Six figures are enough for a picture."""
    return float(f"{value:.6g}")
