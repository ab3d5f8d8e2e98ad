"""The status of a run as text: its progress, its best value, and the time left."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta

from lightning_bge.advisor.report.format import (
    describe_state,
    describe_trial,
    format_duration,
    format_number,
    format_time_left,
    name_trial,
)
from lightning_bge.advisor.report.run_data import RunData
from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.analysis.hours import StudyClock, hours_saved
from lightning_bge.hpo.config import OUTER_FOLDS
from lightning_bge.hpo.forecast.eta import Eta
from lightning_bge.hpo.storage.files import study_files
from lightning_bge.hpo.trials import FAILURES
from lightning_bge.runtime.locations import file_sizes

MAX_RUNNING = 10  # running trials that are listed
MAX_ENDED = 5  # ended trials that are listed
MAX_METRICS = 6  # values of an epoch that are listed


def describe_failures(run: RunData) -> str:
    """Why each trial of a study has failed: its error, its hyperparameters, and where its traceback is."""
    trials = () if run.history is None else (*run.history.trials, *run.history.seed_replicates)
    folder = study_files((run.config.get("hpo") or {}).get("files"), run.path) / FAILURES
    names, lines = sorted(file_sizes(folder)), list[str]()
    for trial in trials:
        if trial.outcome in ("failed", "interrupted", "left out"):
            lines.append(f"trial {trial.number} {trial.outcome}: {trial.note or 'no reason is recorded'}")
            lines += [f"  {name}: {value}" for name, value in trial.params.items()]
            lines += [f"  {folder / name}" for name in names if name.endswith(f"-trial-{trial.number}.txt")]
    return "\n".join(lines or ["no trial has failed"])


def watch_status(read: Callable[[], RunData], seconds: float) -> None:
    """Show the status in the terminal until the run has ended, or until Ctrl-C.

    Args:
        read: reads the run; its errors are raised.
        seconds: time between two updates.
    """
    from rich.live import Live
    from rich.text import Text

    run = read()
    live = Live(Text(describe_status(run)), auto_refresh=False, vertical_overflow="visible")
    with suppress(KeyboardInterrupt), live:
        while not run.ended:
            time.sleep(seconds)
            run = read()
            live.update(Text(describe_status(run)), refresh=True)


def describe_status(run: RunData) -> str:
    """The status of a study or a training run."""
    kind = "study" if run.is_study else "training run"
    head = f"{kind} {run.path.resolve().name}: {describe_state(run)}"
    if not run.is_study:
        lines = _describe_fit(run)
    elif run.history is None or not run.history.trials:
        lines = ["no trial has started yet"]
    else:
        lines = _describe_study(run, run.history)
    return "\n".join([head, *_describe_nested(run), *lines])


def _describe_nested(run: RunData) -> list[str]:
    """How far the nested cross-validation is, where there is one."""
    n_outer_folds = (run.config.get("hpo") or {}).get("outer_folds")
    if n_outer_folds is None:
        return []
    folder = study_files(run.config["hpo"].get("files"), run.path) / OUTER_FOLDS
    ended = sum((folder / str(k) / "summary.json").is_file() for k in range(n_outer_folds))
    return [f"nested     {ended} of {n_outer_folds} inner studies have results, in {folder}"]


def _describe_study(run: RunData, history: History) -> list[str]:
    # fewer may be asked for than there are already
    known = history.n_trials is not None and history.n_trials >= history.n_finished
    planned = f" of {history.n_trials:,}" if known else ""
    counts = [f"{number:,} {outcome}" for outcome, number in history.counts.items() if outcome != "resumed"]
    resumed = f"; {history.counts['resumed']:,} paused trials were resumed" if history.counts["resumed"] else ""
    lines = [
        f"trials     {history.n_finished:,}{planned} finished: {', '.join(counts)}{resumed}",
        f"best       {_best(history)}",
        f"time       {_hours(history)}",
    ]
    if history.is_running:
        lines.append(f"time left  {_time_left(run.time_left)}")
    if history.seed_replicates:
        complete = sum(trial.outcome == "complete" for trial in history.seed_replicates)
        lines.append(f"seeds      {complete} runs of the best trials with other seeds are complete")
    running = [trial for trial in history.trials if trial.outcome == "running"]
    if running:
        lines += ["", "running trials", *(f"  {_running(trial, history)}" for trial in running[:MAX_RUNNING])]
        lines += [f"  and {len(running) - MAX_RUNNING} more"] if len(running) > MAX_RUNNING else []
    ended = sorted((trial.end, trial.number) for trial in history.trials if trial.end is not None)
    if ended:
        last = [history.trials[number] for _, number in reversed(ended[-MAX_ENDED:])]
        lines += ["", "last trials", *(f"  {describe_trial(trial, history)}" for trial in last)]
    return lines


def _best(history: History) -> str:
    best, goal = history.best, history.goal
    if best is None:
        return "no trial is complete yet"
    cost = "" if best.cost is None else f", {goal.cost} {best.cost:.4g}"
    return f"{goal.metric} {best.value:.4f}{cost} (trial {best.number})"


def _hours(history: History) -> str:
    savings = hours_saved(history)
    saved = f"; pruning has saved about {format_duration(savings.saved)}" if savings.trials else ""
    return f"{format_duration(StudyClock(history).hours())} so far{saved}"


def _time_left(eta: Eta | None) -> str:
    if eta is None:
        return "not known before the first trial has ended"
    mid, interval = format_time_left(eta)
    return f"about {mid} ({interval}), until {datetime.now() + timedelta(seconds=eta.mid):%Y-%m-%d %H:%M}"


def _running(trial: PastTrial, history: History) -> str:
    assert trial.start is not None
    steps, step = history.steps, trial.last_step
    age = format_duration((history.read_at - trial.start).total_seconds() / 3600)
    text = f"{name_trial(trial)}, for {age}"
    if history.goal.cost is not None:  # such a study reports nothing before a trial's end
        return text
    # it now works on what follows its last step
    fold, part = divmod(min(step, steps.total - 1), steps.per_fold)
    in_fold = f"fold {fold + 1} of {steps.folds}, " if steps.folds > 1 else ""
    value = f", {history.goal.metric} {trial.values[step]:.4f}" if step in trial.values else ""
    epoch = f"epoch {part // steps.per_epoch + 1} of {steps.epochs}"
    return f"{text}: {in_fold}{epoch}, step {step} of {steps.total}{value}"


# ---------------------------------------------------------------------- a training run


def _describe_fit(run: RunData) -> list[str]:
    planned = (run.config.get("trainer") or {}).get("max_epochs")
    lines = [f"epochs     {len(run.epochs)}{'' if planned is None else f' of {planned}'} finished"]
    if run.epochs:
        last = run.epochs[-1]
        first = [run.logged, "val_loss", "train_loss", "train_tokens_per_s", "train_data_wait"]
        names = [name for name in dict.fromkeys([*first, *sorted(last)]) if name in last]
        names = [name for name in names if name not in ("epoch", "step")][:MAX_METRICS]
        lines += [f"{name:<20} {format_number(last[name])}" for name in names]
    for part in ("validation", "test"):
        found = (run.summary or {}).get(part) or {}
        value = found.get(run.logged.removeprefix("val_"), found.get(run.metric))
        if value is not None:
            lines.append(f"{part:<10} {run.metric} {value:.4f}")
    return lines
