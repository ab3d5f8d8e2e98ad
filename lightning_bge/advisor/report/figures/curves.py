"""The figures of a study by step: learning curves, and the steps at which trials ended."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, GRID, MUTED, RUST
from lightning_bge.advisor.report.figures.style import OUTCOMES, Mark, bar_style, figure, integer_ticks
from lightning_bge.advisor.report.figures.traces import MAX_SINGLE, add_lines, six_digits, trial_label
from lightning_bge.hpo.analysis.history import History, PastTrial

EARLY = ("paused", "pruned", "diverged", "out of memory")


def learning_curves(history: History) -> go.Figure:
    """The values that trials reported by step; a mark ends the lines of trials that were ended early."""
    fig = figure(400, {"title": _step_title(history)}, {"title": html.escape(history.goal.metric)})
    curves = [(trial, _curve(trial)) for trial in history.trials if trial.outcome not in ("resumed", "waiting")]
    curves = [(trial, curve) for trial, curve in curves if curve]
    early = [(trial, curve) for trial, curve in curves if trial.outcome in EARLY]
    best = history.best
    done = [curve for trial, curve in curves if trial.outcome == "complete" and trial is not best]
    if len(history.trials) > MAX_SINGLE:
        _band(fig, [curve for _, curve in early], "ended early", OUTCOMES["paused"])
        _band(fig, done, "complete", OUTCOMES["complete"]._replace(pattern="\\", dash="dot"))
    else:
        _ended_early(fig, history, early)
        if done:
            name = f"complete ({len(done):,})"
            add_lines(fig, *_lines(done), name=name, line={"color": BLUE, "width": 1.2}, opacity=0.6)
    if running := [curve for trial, curve in curves if trial.outcome == "running"]:
        add_lines(fig, *_lines(running), name="running", line={"color": OUTCOMES["running"].color, "dash": "dash"})
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
            hovertemplate=f"{name}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    _mark_folds(fig, history)
    return fig


def _curve(trial: PastTrial) -> dict[int, float]:
    """Step -> value as reported; where a cost is minimized nothing is reported, then the validations of each fold."""
    found = trial.values or {one.step: one.value for fold in trial.curve for one in fold}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _lines(curves: Sequence[dict[int, float]]) -> tuple[list[list[int]], list[list[float]]]:
    return [list(curve) for curve in curves], [[six_digits(value) for value in curve.values()] for curve in curves]


def _ended_early(fig: go.Figure, history: History, early: Sequence[tuple[PastTrial, dict[int, float]]]) -> None:
    for outcome in EARLY:
        group = [(trial, curve) for trial, curve in early if trial.outcome == outcome]
        if not group:
            continue
        mark, (xs, ys) = OUTCOMES[outcome], _lines([curve for _, curve in group])
        add_lines(fig, xs, ys, line={"color": mark.color, "width": 1.5}, opacity=0.45)
        fig.add_scatter(
            x=[x[-1] for x in xs],
            y=[y[-1] for y in ys],
            mode="markers",
            name=f"{outcome} ({len(group):,})",
            opacity=0.75,
            marker={"symbol": mark.symbol, "color": mark.color, "size": 7, "line": {"color": mark.color, "width": 1.5}},
            hovertext=[trial_label(trial, history) for trial, _ in group],
            hoverinfo="text",
        )


def _band(fig: go.Figure, curves: Sequence[dict[int, float]], name: str, mark: Mark) -> None:
    """The 10 %, 50 % and 90 % quantiles of many curves, at the steps that at least ten of them have reached."""
    steps = [step for step in sorted({s for curve in curves for s in curve}) if sum(step in c for c in curves) >= 10]
    if not steps:
        return
    table = [np.quantile([curve[step] for curve in curves if step in curve], (0.1, 0.5, 0.9)) for step in steps]
    low, middle, high = ([six_digits(float(row[i])) for row in table] for i in range(3))
    edge = {"x": steps, "mode": "lines", "line": {"width": 0.7, "color": mark.color}, "hoverinfo": "skip"}
    fill = {"shape": mark.pattern, "fgcolor": mark.color, "bgcolor": "rgba(0,0,0,0)", "size": 6, "solidity": 0.12}
    fig.add_scatter(**edge, y=low, showlegend=False)
    fig.add_scatter(**edge, y=high, fill="tonexty", fillpattern=fill, name=f"{name} ({len(curves):,}), middle 80 %")
    fig.add_scatter(
        x=steps,
        y=middle,
        mode="lines+markers",
        line={"color": mark.color, "width": 2, "dash": mark.dash},
        marker={"symbol": mark.symbol, "size": 7},
        showlegend=False,
        hovertemplate=f"{name}, median at step %{{x}}: %{{y:.4f}}<extra></extra>",
    )


def _step_title(history: History) -> str:
    steps = history.steps
    parts = [f"{steps.folds} folds" if steps.folds > 1 else "", f"{steps.epochs} epochs"]
    parts += [f"{steps.per_epoch} validations"] if steps.per_epoch > 1 else []
    return f"step ({' x '.join(part for part in parts if part)})"


def _mark_folds(fig: go.Figure, history: History, height: int = 0) -> None:
    """Draw lines between the folds, and write their names at the bottom (0) or at the top (1)."""
    folds, width = history.steps.folds, history.steps.per_fold
    fig.update_xaxes(range=[0.5, history.steps.total + 0.5], **integer_ticks(1, history.steps.total))
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
    """How many trials ended at which step."""
    fig = figure(280, {"title": _step_title(history)}, {"title": "trials"}, barmode="stack", bargap=0.15)
    for outcome in (*EARLY, "complete"):
        trials = [trial for trial in history.trials if trial.outcome == outcome]
        if trials:
            total = history.steps.total
            at = Counter(total if outcome == "complete" else trial.last_step for trial in trials)
            fig.add_bar(
                x=list(at),
                y=list(at.values()),
                width=0.8,
                name=f"{outcome} ({len(trials):,})",
                marker=bar_style(OUTCOMES[outcome]),
                hovertemplate=f"{outcome} at step %{{x}}: %{{y}}<extra></extra>",
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
    # step 0: ended before the first step; the names of the folds need room above the bars
    fig.update_xaxes(range=[min([1, *heights]) - 0.5, history.steps.total + 0.5])
    fig.update_yaxes(range=[0, 1.25 * max(heights.values(), default=1)])
    return fig
