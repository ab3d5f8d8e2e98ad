"""A run in a screenful of text: how far it is, what is best, and when it will end."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from rich.live import Live
from rich.text import Text

from lightning_bge.advisor.report.format import ORDER, duration, figure_text, state_of
from lightning_bge.advisor.report.run_data import RunFolder, read_run
from lightning_bge.hpo.analysis.history import History, PastTrial, time_left
from lightning_bge.hpo.analysis.hours import SearchClock, hours_saved

LAST = 5  # trials that are listed
METRICS = 6  # figures of an epoch that are listed


def describe_status(run_dir: Path) -> str:
    """How a search or a training run stands; nothing in its folder is changed, and workers may go on meanwhile.

    Args:
        run_dir: the run's folder.

    Raises:
        ConfigError: it is no run folder.
        StudyError: its journal is corrupt.
    """
    return _describe(read_run(run_dir))


def watch_status(run_dir: Path, seconds: float) -> None:
    """Show it, anew each time that so many seconds have passed, until nothing is left to wait for, or until Ctrl-C.

    Raises:
        ConfigError: it is no run folder.
        StudyError: its journal is corrupt.
    """
    run = read_run(run_dir)
    live = Live(Text(_describe(run)), auto_refresh=False, vertical_overflow="visible")
    with suppress(KeyboardInterrupt), live:
        while not run.ended:
            time.sleep(seconds)
            run = read_run(run_dir)
            live.update(Text(_describe(run)), refresh=True)


def _describe(run: RunFolder) -> str:
    kind = "search" if run.is_study else "training run"
    head = f"{kind} {run.path.resolve().name}: {state_of(run)}"
    if not run.is_study:
        lines = _fit(run)
    elif run.history is None or not run.history.trials:
        lines = ["no trial has begun yet"]
    else:
        lines = _study(run, run.history)
    return "\n".join([head, *lines])


def _study(run: RunFolder, history: History) -> list[str]:
    counts = history.counts
    planned = "" if history.planned is None else f" of {history.planned:,}"
    found = ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in ORDER if counts[outcome])
    lines = [f"trials     {history.begun:,}{planned} ended: {found}", f"best       {_best(history)}", _hours(history)]
    if history.going_on:
        lines.append(f"time left  {_left(run.path)}")
    if history.seed_replicates:
        ended = sum(trial.outcome == "complete" for trial in history.seed_replicates)
        lines.append(f"repeats    {ended} of the best trials' runs with other seeds have ended")
    running = [trial for trial in history.trials if trial.outcome == "running"]
    if running:
        lines += ["", "running"]
        lines += [f"  {_running(trial, history)}" for trial in running[:10]]
        lines += [f"  and {len(running) - 10} more"] if len(running) > 10 else []
    ended_last = sorted((trial for trial in history.trials if trial.end is not None), key=_ended)[-LAST:]
    if ended_last:
        lines += ["", "ended last"]
        lines += [f"  {_line(trial, history)}" for trial in reversed(ended_last)]
    return lines


def _ended(trial: PastTrial) -> datetime:
    assert trial.end is not None
    return trial.end


def _best(history: History) -> str:
    best = history.best
    if best is None:
        return "no trial has run to its end yet"
    cost = "" if best.cost is None else f", {history.cost} {best.cost:.4g}"
    return f"{history.metric} {best.value:.4f}{cost} (trial {best.number})"


def _hours(history: History) -> str:
    savings = hours_saved(history)
    line = f"time       {duration(SearchClock(history).hours())} so far"
    if savings.trials:
        line += f"; pruning has saved about {duration(savings.saved)}"
    return line


def _left(run_dir: Path) -> str:
    eta = time_left(run_dir)
    if eta is None:
        return "not known before the first trial has ended"
    end = datetime.now() + timedelta(seconds=eta.mid)
    span = f"{duration(eta.low / 3600)} to {duration(eta.high / 3600)}"
    return f"about {duration(eta.mid / 3600)} ({span} in 8 cases of 10), until {end:%Y-%m-%d %H:%M}"


def _running(trial: PastTrial, history: History) -> str:
    assert trial.start is not None
    steps, made = history.steps, trial.last_report
    age = duration((history.read - trial.start).total_seconds() / 3600)
    goes_on = "" if trial.continues is None else f" (goes on with {trial.continues})"
    # what it is working on now is what comes after its last report
    fold, part = divmod(min(made, steps.total - 1), steps.per_fold)
    where = f"epoch {part // steps.per_epoch + 1} of {steps.epochs}"
    where = f"fold {fold + 1} of {steps.folds}, {where}" if steps.folds > 1 else where
    value = f", {history.metric} {trial.reports[made]:.4f}" if made in trial.reports else ""
    # where a cost is minimised too nothing is reported before a trial's end
    where = "" if history.cost is not None else f": {where}, {made} of {steps.total} reports{value}"
    return f"trial {trial.number}{goes_on}, for {age}{where}"


def _line(trial: PastTrial, history: History) -> str:
    goes_on = "" if trial.continues is None else f" (goes on with {trial.continues})"
    if trial.value is not None:
        what = f"complete, {history.metric} {trial.value:.4f}"
    else:
        what = f"{trial.outcome} at report {trial.last_report} of {history.steps.total}"
        if trial.last_report in trial.reports:
            what += f", {history.metric} {trial.reports[trial.last_report]:.4f}"
        what += f" ({trial.note})" if trial.note else ""
        what += f" (in {trial.oom['where']})" if trial.oom else ""
    return f"trial {trial.number}{goes_on}: {what}"


# ---------------------------------------------------------------------- a training run


def _fit(run: RunFolder) -> list[str]:
    planned = (run.config.get("trainer") or {}).get("max_epochs")
    of = "" if planned is None else f" of {planned}"
    lines = [f"epochs     {len(run.epochs)}{of} ended"]
    if run.epochs:
        last = run.epochs[-1]
        metric = f"val_{(run.config.get('monitor') or {}).get('metric')}"
        names = [metric, "val_loss", "train_loss", "train_tokens_per_s", "train_data_wait", *sorted(last)]
        shown = [name for name in dict.fromkeys(names) if name in last and name not in ("epoch", "step")][:METRICS]
        lines += [f"{name:<20} {figure_text(last[name])}" for name in shown]
    if run.summary is not None:
        for part in ("validation", "test"):
            value = (run.summary.get(part) or {}).get(run.summary.get("metric"))
            if value is not None:
                lines.append(f"{part:<10} {run.summary['metric']} {value:.4f}")
    return lines
