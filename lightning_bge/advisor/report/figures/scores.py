"""The figures of a study's scores: the best value over time, the scores by fold, and score against cost."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import BLUE, INK, MUTED, RUST
from lightning_bge.advisor.report.figures.style import figure, series_mark, time_unit
from lightning_bge.advisor.report.figures.traces import sample_trials, six_digits, trial_label
from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.analysis.hours import StudyClock, best_over_hours

MAX_FOLD_SCORES = 10  # best trials whose scores by fold are shown


def best_value(history: History) -> go.Figure:
    """The best score so far over the hours of the study, and the score of each complete trial."""
    clock, best = StudyClock(history), best_over_hours(history)
    factor, unit = time_unit(clock.hours())
    fig = figure(
        340, {"title": f"{unit} of the study", "rangemode": "tozero"}, {"title": html.escape(history.goal.metric)}
    )
    done, name = sample_trials([trial for trial in history.ranked if trial.end is not None], "complete")
    fig.add_scatter(
        x=[six_digits(factor * clock.hours(trial.end)) for trial in done],
        y=[six_digits(trial.value) for trial in done],
        mode="markers",
        name=name,
        marker={"symbol": "circle-open", "size": 7, "color": MUTED},
        hovertext=[trial_label(trial, history) for trial in done],
        hoverinfo="text",
    )
    if best:
        # the line is drawn on to the present
        steps = [*best, (clock.hours(), best[-1][1])]
        fig.add_scatter(
            x=[six_digits(factor * hours) for hours, _ in steps],
            y=[six_digits(trial.value) for _, trial in steps],
            mode="lines+markers",
            name="best so far",
            line={"color": BLUE, "width": 3, "shape": "hv"},
            marker={"symbol": ["diamond"] * len(best) + ["line-ns"], "size": 9, "color": BLUE},
            hovertext=[trial_label(trial, history) for _, trial in steps],
            hoverinfo="text",
        )
    return fig


def fold_scores(history: History) -> go.Figure:
    """The scores of the best trials in each fold, their mean, and the standard deviation over the folds."""
    best = [trial for trial in history.ranked if trial.fold_scores][:MAX_FOLD_SCORES]
    names = [f"trial {trial.number}" for trial in best]
    fig = figure(
        110 + 34 * len(best), {"title": html.escape(history.goal.metric), "showgrid": True}, {"showgrid": True}
    )
    for fold in range(history.steps.folds):
        mark = series_mark(fold)
        fig.add_scatter(
            x=[six_digits(trial.fold_scores[fold]) for trial in best],
            y=names,
            mode="markers",
            name=f"fold {fold + 1}",
            marker={"symbol": f"{mark.symbol}-open", "color": mark.color, "size": 9, "line": {"width": 2}},
            hovertemplate=f"%{{y}}, fold {fold + 1}: %{{x:.4f}}<extra></extra>",
        )
    fig.add_scatter(
        x=[six_digits(float(np.mean(trial.fold_scores))) for trial in best],
        y=names,
        mode="markers",
        name="mean ± standard deviation",
        marker={"symbol": "line-ns", "color": INK, "size": 15, "line": {"color": INK, "width": 3}},
        error_x={
            "array": [six_digits(float(np.std(trial.fold_scores, ddof=1))) for trial in best],
            "color": INK,
            "thickness": 1.5,
            "width": 4,
        },
        hovertemplate="%{y}: mean %{x:.4f}<extra></extra>",
    )
    fig.update_yaxes(autorange="reversed")
    return fig


def pareto_front(history: History) -> go.Figure:
    """Score against cost of the complete trials, and the Pareto front: no other trial is better in both."""
    cost = f"{html.escape(str(history.goal.cost))}, seconds"
    fig = figure(360, {"title": cost}, {"title": html.escape(history.goal.metric)})
    done = history.ranked
    front: list[PastTrial] = []
    for trial in done:  # the best score first, so that a trial is in the front where its cost is the lowest so far
        if not front or (trial.cost or 0.0) < (front[-1].cost or 0.0):
            front.append(trial)
    others, label = sample_trials([trial for trial in done if trial not in front], "others")
    groups = [
        (others, label, "markers", "circle-open", MUTED),
        (front, f"Pareto front ({len(front):,})", "lines+markers", "diamond", RUST),
    ]
    for trials, name, mode, symbol, color in groups:
        fig.add_scatter(
            x=[six_digits(trial.cost) for trial in trials],
            y=[six_digits(trial.value) for trial in trials],
            mode=mode,
            name=name,
            line={"shape": "hv", "color": color},
            marker={"symbol": symbol, "size": 8, "color": color},
            hovertext=[trial_label(trial, history) for trial in trials],
            hoverinfo="text",
        )
    return fig
