"""The figures of a study: its timeline, the best value over time, the Pareto front, and learning curves."""

import html
import math
from collections.abc import Sequence
from datetime import datetime

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, GRID, MUTED, RUST
from lightning_bge.advisor.report.figure_style import (
    MAX_SINGLE,
    OUTCOME_MARKS,
    add_lines,
    add_trials,
    figure,
    integer_ticks,
    rounded,
    sample_trials,
    time_unit,
)
from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.analysis.hours import StudyClock, best_over_hours

EARLY = ("paused", "pruned", "diverged", "out of memory")


def timeline(history: History) -> go.Figure:
    """When each trial ran and how it ended.

    Up to `MAX_SINGLE` trials have a line each, with a mark at the end; more trials share a row for each outcome.
    """
    few = len(history.trials) <= MAX_SINGLE
    height = min(max(16 * len(history.trials), 140), 480)
    ticks = {"title": "trial", **integer_ticks(0, len(history.trials))} if few else {"type": "category"}
    dates = {"type": "date", "nticks": 4, "tickangle": 0, "showgrid": True}
    fig = figure((160 if few else -160) + height, dates, {"autorange": "reversed", "showgrid": False, **ticks})
    fig.update_layout(showlegend=few)
    started = [trial for trial in history.trials if trial.start and (trial.end or trial.outcome == "running")]
    spans = {trial.number: (_ms(trial.start), _ms(trial.end or history.read_at)) for trial in started if trial.start}
    moments = [moment for span in spans.values() for moment in span]
    size = max(4, min(9, height // max(1, len(history.trials))))
    least = (max(moments) - min(moments)) / 400 if moments else 0.0  # a pixel or two
    for outcome, mark in OUTCOME_MARKS.items():
        trials = [trial for trial in started if trial.outcome == outcome]
        if not trials:
            continue
        name = f"{outcome} ({len(trials):,})"
        ends = [spans[trial.number] for trial in trials]
        line = {"width": 3, "dash": mark.dash} if few else {"width": 18, "simplify": False}
        rows = [trial.number if few else name for trial in trials]
        add_trials(
            fig,
            history,
            [trial for trial in trials for _ in range(3)] if few else [],
            x=[x for start, end in ends for x in (start, max(end, start + least), None)],
            y=[y for row in rows for y in (row, row, None)],
            mode="lines+markers" if few else "lines",
            line={"color": mark.color, **line},
            marker={"symbol": mark.symbol, "color": mark.color, "size": [0, size, 0] * len(trials), "opacity": 1},
            name=name,
        )
    return fig


def _ms(moment: datetime) -> int:
    """Local time in milliseconds, as a date axis without time zones takes it."""
    return round((moment - datetime(1970, 1, 1)).total_seconds() * 1000)


def best_value(history: History) -> go.Figure:
    """The best score so far over the hours of the study, and the score of each complete trial."""
    clock, best = StudyClock(history), best_over_hours(history)
    factor, unit = time_unit(clock.hours())
    x = {"title": f"{unit} of the study", "rangemode": "tozero"}
    fig = figure(340, x, {"title": html.escape(history.goal.metric)})
    done, name = sample_trials([trial for trial in history.ranked if trial.end is not None], "complete")
    add_trials(
        fig,
        history,
        done,
        x=rounded([factor * clock.hours(trial.end) for trial in done]),
        y=rounded([trial.value for trial in done]),
        mode="markers",
        name=name,
        marker={"symbol": "circle-open", "size": 7, "color": MUTED},
    )
    if best:
        steps = [*best, (clock.hours(), best[-1][1])]  # the line ends at the present
        add_trials(
            fig,
            history,
            [trial for _, trial in steps],
            x=rounded([factor * hours for hours, _ in steps]),
            y=rounded([trial.value for _, trial in steps]),
            mode="lines+markers",
            name="best so far",
            line={"color": BLUE, "width": 3, "shape": "hv"},
            marker={"symbol": ["diamond"] * len(best) + ["line-ns"], "size": 9, "color": BLUE},
        )
    return fig


def pareto_front(history: History) -> go.Figure:
    """Score against cost of the complete trials, and the Pareto front: no other trial is better in both."""
    fig = figure(
        360,
        {"title": f"{html.escape(str(history.goal.cost))}, seconds"},
        {"title": html.escape(history.goal.metric)},
    )
    front: list[PastTrial] = []
    for trial in history.ranked:  # the best score first: a trial is in the front where its cost is the lowest so far
        if not front or (trial.cost or 0.0) < (front[-1].cost or 0.0):
            front.append(trial)
    others, label = sample_trials([trial for trial in history.ranked if trial not in front], "others")
    for trials, name, mode, symbol, color in (
        (others, label, "markers", "circle-open", MUTED),
        (front, f"Pareto front ({len(front):,})", "lines+markers", "diamond", RUST),
    ):
        add_trials(
            fig,
            history,
            trials,
            x=rounded([trial.cost for trial in trials]),
            y=rounded([trial.value for trial in trials]),
            mode=mode,
            name=name,
            line={"shape": "hv", "color": color},
            marker={"symbol": symbol, "size": 8, "color": color},
        )
    return fig


def learning_curves(history: History) -> go.Figure:
    """The values that trials reported by step; a mark ends the lines of trials that were ended early."""
    steps, best = history.steps, history.best
    parts = [f"{steps.folds} folds"] if steps.folds > 1 else []
    parts += [f"{steps.epochs} epochs", *([f"{steps.per_epoch} validations"] if steps.per_epoch > 1 else [])]
    x = {"title": f"step ({' x '.join(parts)})", "range": [0.5, steps.total + 0.5], **integer_ticks(1, steps.total)}
    fig = figure(400, x, {"title": html.escape(history.goal.metric)})
    shown = [trial for trial in history.trials if trial is not best and _curve(trial)]
    by_outcome = {outcome: [trial for trial in shown if trial.outcome == outcome] for outcome in OUTCOME_MARKS}
    if len(history.trials) > MAX_SINGLE:
        _add_band(fig, [trial for outcome in EARLY for trial in by_outcome[outcome]], "ended early", "paused")
        _add_band(fig, by_outcome["complete"], "complete", "complete")
    for outcome in ("running",) if len(history.trials) > MAX_SINGLE else (*EARLY, "complete", "running"):
        if by_outcome[outcome]:
            _add_curves(fig, history, by_outcome[outcome], outcome)
    if best is not None and (curve := _curve(best)):
        name = f"best: trial {best.number}"
        fig.add_scatter(
            x=list(curve),
            y=rounded([*curve.values()]),
            name=name,
            mode="lines+markers",
            line={"color": RUST, "width": 3},
            marker={"symbol": "diamond", "size": 7},
            hovertemplate=f"{name}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    _mark_folds(fig, history)
    return fig


def _curve(trial: PastTrial) -> dict[int, float]:
    return {step: value for step, value in trial.values.items() if math.isfinite(value)}


def _add_curves(fig: go.Figure, history: History, trials: Sequence[PastTrial], outcome: str) -> None:
    """A line for each trial; lines of trials that were ended early end in a mark."""
    mark, curves, early = OUTCOME_MARKS[outcome], [_curve(trial) for trial in trials], outcome in EARLY
    name = f"{outcome} ({len(trials):,})"
    line = {"color": mark.color, "width": 1.5, "dash": "dash" if outcome == "running" else "solid"}
    add_lines(fig, curves, None if early else name, line=line, opacity=0.5)
    if early:
        add_trials(
            fig,
            history,
            trials,
            x=[max(curve) for curve in curves],
            y=rounded([curve[max(curve)] for curve in curves]),
            mode="markers",
            name=name,
            opacity=0.75,
            marker={"symbol": mark.symbol, "color": mark.color, "size": 7, "line": {"color": mark.color, "width": 1.5}},
        )


def _add_band(fig: go.Figure, trials: Sequence[PastTrial], name: str, outcome: str) -> None:
    """The 10 %, 50 % and 90 % quantiles of many trials, at the steps that at least ten of them have reached."""
    curves, mark = [_curve(trial) for trial in trials], OUTCOME_MARKS[outcome]
    steps = [step for step in sorted({s for curve in curves for s in curve}) if sum(step in c for c in curves) >= 10]
    if not steps:
        return
    quantiles = [np.quantile([curve[step] for curve in curves if step in curve], (0.1, 0.5, 0.9)) for step in steps]
    low, middle, high = (rounded(one) for one in zip(*quantiles, strict=True))
    edge = {"x": steps, "mode": "lines", "line": {"width": 0.7, "color": mark.color}, "hoverinfo": "skip"}
    pattern = {"shape": "/" if outcome == "paused" else "\\", "fgcolor": mark.color, "bgcolor": "rgba(0,0,0,0)"}
    fill = {"fill": "tonexty", "fillpattern": {**pattern, "size": 6, "solidity": 0.12}}
    fig.add_scatter(**edge, y=low, showlegend=False)
    fig.add_scatter(**edge, **fill, y=high, name=f"{name} ({len(curves):,}), middle 80 %")
    fig.add_scatter(
        x=steps,
        y=middle,
        mode="lines+markers",
        line={"color": mark.color, "width": 2, "dash": "dot"},
        marker={"symbol": mark.symbol, "size": 7},
        showlegend=False,
        hovertemplate=f"{name}, median at step %{{x}}: %{{y:.4f}}<extra></extra>",
    )


def _mark_folds(fig: go.Figure, history: History) -> None:
    """Draw lines between the folds, and write their names at the bottom."""
    folds, width = history.steps.folds, history.steps.per_fold
    for fold in range(folds if folds > 1 else 0):
        if fold:
            fig.add_vline(fold * width + 0.5, line={"color": GRID, "width": 1, "dash": "dash"}, layer="below")
        x = (fold + 0.5) * width + 0.5
        text = f"fold {fold + 1}" if folds <= 5 else str(fold + 1)
        style = {"showarrow": False, "font": {"color": MUTED, "size": 11}}
        fig.add_annotation(x=x, y=0, yref="paper", yanchor="bottom", text=text, **style)
