"""The figures of a study over time: when trials ran, what was best, where the hours went, a function each."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lightning_bge.advisor.html.theme import (
    BLUE,
    GREY,
    GRID,
    MUTED,
    OUTCOMES,
    Look,
    counted,
    figure,
    pattern,
    series,
    time_unit,
)
from lightning_bge.advisor.report.figures.curves import BARS, short, some, told
from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.analysis.hours import Savings, SearchClock, best_over_hours

GROUPS = 120  # points that very many trials are drawn as
SEGMENTS = 60  # trials up to which a bar shows its folds
DATES = {"type": "date", "nticks": 4, "tickangle": 0, "showgrid": True}


def timeline(history: History) -> go.Figure:
    """When each trial ran and how it ended: one below the other, or where they are very many in a lane for each end."""
    begun = [trial for trial in history.trials if trial.start is not None and trial.end is not None]
    begun += [trial for trial in history.trials if trial.outcome == "running"]
    groups = [(outcome, [trial for trial in begun if trial.outcome == outcome]) for outcome in OUTCOMES]
    groups = [(outcome, trials) for outcome, trials in groups if trials]
    if len(history.trials) > BARS:
        return _lanes(history, groups)
    y = {"title": "trial", "autorange": "reversed", "showgrid": False, **counted(0, len(history.trials))}
    fig = figure(160 + min(max(16 * len(history.trials), 140), 480), DATES, y, barmode="overlay")
    for outcome, trials in groups:
        _bars(fig, history, trials, OUTCOMES[outcome], f"{outcome} ({len(trials):,})")
    return fig


def _bars(fig: go.Figure, history: History, trials: Sequence[PastTrial], look: Look, name: str) -> None:
    base, widths, numbers, texts = [], [], [], []
    by_number = {trial.number: trial for trial in history.trials}
    for trial in trials:
        assert trial.start is not None
        start, end = trial.start, trial.end or history.read
        cuts = [start]
        if len(history.trials) <= SEGMENTS:
            parent = by_number.get(trial.continues) if trial.continues is not None else None
            for seconds in _own_fold_seconds(trial, parent)[:-1]:
                cuts.append(min(cuts[-1] + timedelta(seconds=seconds), end))
        for begin, stop in zip(cuts, [*cuts[1:], end], strict=True):
            base.append(_ms(begin))
            widths.append(round((stop - begin).total_seconds() * 1000))
            numbers.append(trial.number)
            texts.append(told(trial, history))
    fig.add_bar(
        orientation="h",
        base=base,
        x=widths,
        y=numbers,
        width=0.75,
        name=name,
        marker=pattern(look),
        hovertext=texts,
        hoverinfo="text",
    )


def _own_fold_seconds(trial: PastTrial, parent: PastTrial | None) -> list[float]:
    """Seconds of each fold that it worked on; what it took over from the trial that it continues is not its own."""
    before = {report for fold in parent.curve for report in fold} if parent else set()
    own = [[report for report in fold if report not in before] for fold in trial.curve]
    return [sum(report.train_seconds + report.val_seconds for report in fold) for fold in own if fold]


def _lanes(history: History, groups: Sequence[tuple[str, Sequence[PastTrial]]]) -> go.Figure:
    y = {"range": [-len(groups) + 0.4, 0.75], "visible": False}
    fig = figure(50 + 46 * len(groups), DATES, y, showlegend=False)
    every = [trial for _, group in groups for trial in group]
    ends = [_ms(moment) for trial in every for moment in (trial.start, trial.end or history.read) if moment]
    least = (max(ends) - min(ends)) / 700  # about a pixel
    for row, (outcome, trials) in enumerate(groups):
        x: list[float | None] = []
        y_: list[float | None] = []
        for trial in trials:
            if trial.start:
                start = _ms(trial.start)
                end = max(_ms(trial.end or history.read), start + least)
                x += [start, end, end, start, None]
                y_ += [-row - 0.22, -row - 0.22, -row + 0.22, -row + 0.22, None]
        # one shape for all of them: thousands of bars would take seconds to draw
        fig.add_scatter(x=x, y=y_, mode="none", fill="toself", fillcolor=OUTCOMES[outcome].color, hoverinfo="skip")
        fig.add_annotation(
            x=0,
            xref="paper",
            xanchor="left",
            y=-row + 0.22,
            yanchor="bottom",
            showarrow=False,
            text=f"{outcome} ({len(trials):,})",
        )
    return fig


def _ms(moment: datetime) -> int:
    """Local time as a date axis takes it, which knows no time zones."""
    return round((moment - datetime(1970, 1, 1)).total_seconds() * 1000)


def best_value(history: History) -> go.Figure:
    """The best score so far over the hours of the search, and each complete trial's."""
    clock, best = SearchClock(history), best_over_hours(history)
    factor, unit = time_unit(clock.hours())
    fig = figure(340, {"title": f"{unit} of search", "rangemode": "tozero"}, {"title": html.escape(history.metric)})
    done, name = some([trial for trial in history.ranked if trial.end is not None], "ran to their end")
    fig.add_scatter(
        x=[short(factor * clock.hours(trial.end)) for trial in done],
        y=[short(trial.value) for trial in done],
        mode="markers",
        name=name,
        marker={"symbol": "circle-open", "size": 7, "color": MUTED},
        hovertext=[told(trial, history) for trial in done],
        hoverinfo="text",
    )
    if best:
        points = [(short(factor * hours), short(trial.value), told(trial, history)) for hours, trial in best]
        points.append((short(factor * clock.hours()), points[-1][1], points[-1][2]))
        x, y, texts = zip(*points, strict=True)
        fig.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name="best so far",
            line={"color": BLUE, "width": 3, "shape": "hv"},
            marker={"symbol": ["diamond"] * len(best) + ["line-ns"], "size": 9, "color": BLUE},
            hovertext=texts,
            hoverinfo="text",
        )
    return fig


def hours(history: History, savings: Savings) -> go.Figure:
    """Where the hours went, and those that were saved."""
    spent: defaultdict[str, float] = defaultdict(float)
    for trial in history.trials:
        if trial.start and trial.end:
            kind = {"complete": "ran to the end"}.get(trial.outcome, "ended early or went on")
            kind = "no result" if trial.outcome in ("failed", "interrupted", "out of memory", "diverged") else kind
            spent[kind] += (trial.end - trial.start).total_seconds() / 3600
    factor, unit = time_unit(savings.spent + savings.saved)
    fig = figure(190, {"title": unit, "showgrid": True}, {"showgrid": False}, barmode="stack", bargap=0.3)
    rows = [("ran to the end", "complete"), ("ended early or went on", "paused"), ("no result", "failed")]
    for name, outcome in rows:
        if spent[name]:
            _part(fig, "spent", factor * spent[name], name, pattern(OUTCOMES[outcome]), unit)
    hollow = pattern(Look(GRID, "x", "", ""))
    hollow["pattern"]["fgcolor"], hollow["line"] = GREY, {"color": GREY, "width": 1}
    _part(fig, "saved", factor * savings.saved, "saved (estimate)", hollow, unit)
    fig.update_yaxes(autorange="reversed")
    return fig


def _part(fig: go.Figure, row: str, length: float, name: str, marker: dict[str, Any], unit: str) -> None:
    fig.add_bar(
        orientation="h",
        y=[row],
        x=[short(length)],
        name=f"{name}: {length:,.3g} {unit}",
        marker=marker,
        hovertemplate=f"{name}: %{{x:.3g}} {unit}<extra></extra>",
    )


def seconds_a_report(history: History) -> go.Figure:
    """How long training and validation took between two reports, for each trial, or for several in a row."""
    known = [(trial.number, [one for fold in trial.curve for one in fold]) for trial in history.trials]
    known = [(number, reports) for number, reports in known if reports]
    x = {"title": "trial", **counted(0, len(history.trials))}
    fig = figure(300, x, {"title": "seconds a report", "rangemode": "tozero"})
    size = -(-len(known) // GROUPS) if len(known) > BARS else 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    for row, (name, field) in enumerate((("training", "train_seconds"), ("validation", "val_seconds"))):
        look = series(row)
        medians = [np.median([getattr(one, field) for _, reports in group for one in reports]) for group in groups]
        fig.add_scatter(
            x=[group[0][0] for group in groups],
            y=[short(float(value)) for value in medians],
            mode="markers",
            name=name,
            marker={"symbol": look.symbol, "color": look.color, "size": 5 if size > 1 else 8},
            hovertemplate=f"{name}, from trial %{{x}}: %{{y:.3g}} s<extra></extra>",
        )
    return fig
