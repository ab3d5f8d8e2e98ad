"""The sections of a study's report: results, timeline, learning curves, hours, hyperparameters, best trials, seeds."""

from statistics import stdev
from typing import Any

from lightning_bge.advisor.html.page import Section, cards, meter, paragraph, plot, table
from lightning_bge.advisor.report.figure_style import MAX_SINGLE
from lightning_bge.advisor.report.format import format_duration, format_time_left
from lightning_bge.advisor.report.run_data import RunData
from lightning_bge.advisor.report.secrets import hide_secrets
from lightning_bge.advisor.report.study_figures import best_value, learning_curves, pareto_front, timeline
from lightning_bge.hpo.analysis.exported import describe_exported
from lightning_bge.hpo.analysis.history import OUTCOMES, History
from lightning_bge.hpo.analysis.hours import StudyClock, hours_saved
from lightning_bge.hpo.analysis.importance import parameter_importance
from lightning_bge.hpo.analysis.winner import (
    CORRECTED,
    DIFFERENCES,
    SELECTED,
    describe_notes,
    difference_rows,
    tested_rows,
)

MAX_BEST = 10  # best trials that are listed
NONE_COMPLETE = "No trial is complete yet."


def study_sections(run: RunData) -> list[Section]:
    """The sections of a study, as far as its trials have content for them."""
    history, replicates = run.history, (run.summary or {}).get("seed_replicates")
    if history is None or not history.trials:
        text = "No trial has started yet. Write the report when the first trials have run."
        return [Section("Results", paragraph(text))]
    sections = [
        Section("Results", _results(run, history)),
        Section("Timeline", _timeline(history)),
        Section("Best value over time", _best_value(history)),
        Section("Learning curves", _learning_curves(history)),
    ]
    if history.goal.cost is None:
        sections.append(Section("Hours saved by pruning", _hours_saved(history)))
    sections += [
        Section("Importance of hyperparameters", _importance(history)),
        Section("Best trials", _best_trials(history)),
    ]
    if replicates:
        sections.append(Section("Seed replicates", _seed_replicates(replicates, history.goal.metric)))
    return sections


def _results(run: RunData, history: History) -> str:
    summary = run.summary or {}
    figures = _scores(summary, history)
    if summary.get("threshold") is not None:
        figures.append((f"{summary['threshold']:.3f}", "decision threshold"))
    if summary.get("positive_label") is not None:
        figures.append((summary["positive_label"], "positive label"))
    figures += _progress(run, history)
    text = "" if history.best is not None else paragraph(NONE_COMPLETE)
    text += "".join(paragraph(f"Warning: {warning}.") for warning in summary.get("warnings", []))
    if summary.get("estimate") is not None:
        text += "".join(paragraph(f"{line[0].upper()}{line[1:]}.", "muted") for line in describe_notes(summary))
    if rows := difference_rows(summary.get("estimate") or {}):
        text += paragraph(f"{DIFFERENCES[0].upper()}{DIFFERENCES[1:]}:")
        text += table(["over", history.goal.metric, "interval", ""], rows, (1, 2))
    if summary.get("threshold_note"):
        text += paragraph(f"Threshold: {summary['threshold_note']}.", "muted")
    text += "".join(paragraph(f"{line[0].upper()}{line[1:]}.", "muted") for line in describe_exported(summary))
    counts = [(OUTCOMES[outcome], f"{number:,}") for outcome, number in history.counts.items()]
    return cards(figures) + text + table(["trials", "number"], counts, (1,)) + _pareto_front(history)


def _scores(summary: dict[str, Any], history: History) -> list[tuple[str, str]]:
    """The winner's scores, each with what it says."""
    metric, found = history.goal.metric, []
    if history.best is not None:
        number = summary.get("best_trial", history.best.number)
        value = summary.get("best_value", history.best.value)
        found.append((f"{value:.4f}", f"selected {metric}, mean over the folds of trial {number}; {SELECTED}"))
    if corrected := (summary.get("estimate") or {}).get("corrected"):
        interval = f"{corrected['low']:.4f} to {corrected['high']:.4f}"
        found.append((f"{corrected['value']:.4f}", f"corrected {metric}, {interval} (95 %); {CORRECTED}"))
    for value, text in (
        ((summary.get("test") or {}).get(metric), f"{metric} of the {tested_rows(summary)}"),
        (summary.get("majority_baseline"), f"{metric} of predicting the majority class"),
    ):
        if value is not None:
            found.append((f"{value:.4f}", text))
    return found


def _progress(run: RunData, history: History) -> list[tuple[str, str]]:
    """Figures of the trials and hours so far, and of the time left."""
    savings = hours_saved(history)
    known = history.n_trials is not None and history.n_trials >= history.n_finished
    planned = f" of {history.n_trials:,}" if known else ""
    figures = [
        (f"{history.n_finished:,}{planned}", f"trials finished; {history.counts['complete']:,} are complete"),
        (format_duration(StudyClock(history).hours()), "in which at least one trial was running"),
    ]
    if savings.trials and savings.saved:
        share = savings.saved / (savings.saved + savings.spent)
        text = f"saved by pruning, {share:.0%} of the time without pruning (estimate)"
        figures.append((format_duration(savings.saved), text))
    if (eta := run.time_left) is not None:
        mid, interval = format_time_left(eta)
        figures.append((mid, f"left; {interval}"))
    return figures


def _pareto_front(history: History) -> str:
    if history.goal.cost is None or not history.ranked:
        return ""
    text = "Each mark is a complete trial. No other trial is better in both score and cost than one of the front."
    return plot(pareto_front(history), "front", text)


def _timeline(history: History) -> str:
    text = "Each line is a trial, from its start to its end. Colour, dashes and the mark at the end show the outcome."
    if len(history.trials) > MAX_SINGLE:
        text = "Each line is a trial, from its start to its end, in the row of its outcome."
    if history.counts["resumed"]:
        text += " A resumed trial was paused, and continued later as a trial with another number."
    return plot(timeline(history), "timeline", text)


def _best_value(history: History) -> str:
    if history.best is None:
        return paragraph(NONE_COMPLETE)
    text = "Time counts while at least one trial is running; pauses between two starts of the study are left out. Only "
    text += "complete trials are shown, as the values of other trials are not final."
    return plot(best_value(history), "best", text)


def _learning_curves(history: History) -> str:
    if not any(trial.values for trial in history.trials):
        return paragraph("No trial has reported a value yet.")
    if history.goal.cost is not None:
        text = "The value of each validation, fold by fold."
    elif history.steps.folds > 1:
        text = "The value at each step is the mean over the folds so far, the current fold included."
    else:
        text = "The score so far, at each step."
    if len(history.trials) > MAX_SINGLE:
        text += " A hatched band covers the middle 80 % of the trials at each step that at least ten of them have "
        text += "reached; the dotted line in it is their median."
    elif history.counts["paused"] or history.counts["pruned"]:
        text += " A mark at the end of a line shows how the trial ended early."
    return plot(learning_curves(history), "curves", text)


def _hours_saved(history: History) -> str:
    savings = hours_saved(history)
    if not savings.trials:
        return paragraph("No trial has been ended early so far.")
    text = (
        f"{savings.trials:,} trials were pruned, or paused and not resumed. The hours saved are the steps that these "
        "trials did not train, times the mean seconds per step of the same trial. This is an estimate, as it is not "
        "known which folds would have stopped early. Hours of trials that ran at the same time are added up."
    )
    hours = {"trials so far": savings.spent, "saved (estimate)": savings.saved}
    rows = [(name, format_duration(part), meter(part / sum(hours.values()))) for name, part in hours.items()]
    return table(["", "time", "share of the time without pruning"], rows, (1,)) + paragraph(text, "muted")


def _importance(history: History) -> str:
    shares, note = parameter_importance(history)
    if not shares:
        return paragraph(note)
    text = f"The share of the score's variance that each hyperparameter explains (fANOVA). {note}"
    rows = [(name, meter(share)) for name, share in shares.items()]
    return table(["hyperparameter", "share of the variance"], rows) + paragraph(text, "muted")


def _best_trials(history: History) -> str:
    if not history.ranked:
        return paragraph(NONE_COMPLETE)
    rows = []
    for trial in history.ranked[:MAX_BEST]:
        params = "; ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in hide_secrets(trial.params).items()
        )
        scores = [f"{score:.4f}" for score in trial.fold_scores]
        spread = f"{stdev(trial.fold_scores):.4f}" if len(scores) > 1 else ""
        rows.append((f"trial {trial.number}", f"{trial.value:.4f}", spread, ", ".join(scores), params))
    text = "Trials whose scores differ by less than the standard deviation over the folds are not clearly apart, "
    text += "although all of them use the same folds."
    head = ["trial", history.goal.metric, "standard deviation", "folds", "parameters"]
    return table(head, rows, (1, 2)) + (paragraph(text, "muted") if history.steps.folds > 1 else "")


def _seed_replicates(replicates: dict[str, Any], metric: str) -> str:
    rows = []
    for one in replicates["trials"]:
        values = ", ".join("none" if value is None else f"{value:.4f}" for value in one["values"])
        mean = "not every seed has a value" if one["mean"] is None else f"{one['mean']:.4f}"
        spread = "" if one["spread"] is None else f"{one['spread']:.4f}"
        winner = "winner" if one["trial"] == replicates["winner"] else ""
        rows.append((f"trial {one['trial']}", mean, spread, values, winner))
    text = (
        f"The best trials were trained with {len(replicates['seeds'])} other seeds on the same folds. The winner has "
        f"the best mean {metric} over its seeds, which a single lucky seed does not decide. The first value is that "
        "of the trial itself."
    )
    if replicates.get("missing"):
        text += f" {replicates['missing']} runs are missing, and may change the winner."
    head = ["trial", "mean", "standard deviation", "values", ""]
    return paragraph(text) + table(head, rows, (1, 2))
