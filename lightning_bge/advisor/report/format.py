"""Times, numbers and states of a run as text, for the report and for `lightning-bge status`."""

from lightning_bge.advisor.report.run_data import RunData
from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.forecast.eta import Eta

RESUME = "run the same command to resume it"


def format_duration(hours: float) -> str:
    """A time in seconds, minutes or hours."""
    if hours < 1.5 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1.5:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def format_number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def name_trial(trial: PastTrial) -> str:
    """The trial's number, and that of the trial that it resumes."""
    return f"trial {trial.number}" + ("" if trial.resumes is None else f" (resumes trial {trial.resumes})")


def describe_trial(trial: PastTrial, history: History) -> str:
    """The outcome of a trial in one line, with its score, or with its last step and the value there."""
    metric, step = history.goal.metric, trial.last_step
    if trial.value is not None:
        return f"{name_trial(trial)}: complete, {metric} {trial.value:.4f}"
    value = f", {metric} {trial.values[step]:.4f}" if step in trial.values else ""
    note = f" ({trial.note})" if trial.note else ""
    return f"{name_trial(trial)}: {trial.outcome} at step {step} of {history.steps.total}{value}{note}"


def format_time_left(eta: Eta) -> tuple[str, str]:
    """The estimate of the time left, and its interval."""
    low, mid, high = (format_duration(seconds / 3600) for seconds in (eta.low, eta.mid, eta.high))
    return mid, f"80 % interval: {low} to {high}"


def describe_study(history: History) -> str:
    """What a trial of the study trains, and its metric."""
    steps, goal = history.steps, history.goal
    split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
    text = f"{split} of at most {steps.epochs} epochs each; score: {goal.metric} of the {goal.epoch} epoch"
    text += f"; cost: {goal.cost}" if goal.cost else ""
    return text + (f"; pruner: {history.pruner}" if history.pruner else "")


def describe_state(run: RunData) -> str:
    """Whether the run is finished, running, or was interrupted."""
    history = run.history
    if run.finished:
        return "finished"
    if history is None:
        return "starting" if run.is_study else f"not finished. If it is not running, {RESUME}"
    if history.counts["running"]:
        return f"running ({_count(history.counts['running'], 'trial')})"
    if history.is_running:
        running = sum(trial.outcome == "running" for trial in history.seed_replicates)
        return f"running ({_count(running, 'seed replicate')} of the best trials)"
    if run.trials_finished:
        return f"all trials are finished, but not all results are written. If it is not running, {RESUME}"
    return f"not finished, and no trial is running: {RESUME}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
