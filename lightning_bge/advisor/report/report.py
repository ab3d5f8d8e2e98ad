"""A run as a page to be kept, sent and printed: what it found, how it got there, and how to repeat it."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from lightning_bge.advisor.audit.page import audit_section
from lightning_bge.advisor.html.page import Section, cards, code, paragraph, plot, table, write_page
from lightning_bge.advisor.report.format import duration, figure_text, outcome_counts, state_of, what_is_searched
from lightning_bge.advisor.report.run_data import RunFolder, clean_command, read_run, without_secrets
from lightning_bge.hpo.analysis.history import History, time_left
from lightning_bge.hpo.analysis.hours import SearchClock, hours_saved
from lightning_bge.hpo.analysis.importance import parameter_importance

FEW = 3  # validation metrics that are drawn besides the one that counts


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder: of a search or of a training run, finished or not.

    Args:
        run_dir: the run's folder. Nothing else in it is changed, and workers may go on meanwhile.

    Returns:
        The file.

    Raises:
        ConfigError: it is no run folder.
        StudyError: its journal is corrupt.
    """
    run = read_run(run_dir)
    name = run_dir.resolve().name
    kind = "search" if run.is_study else "training run"
    sections = [*(_study(run) if run.is_study else _fit(run)), _scorecard(run)]
    if run.best is not None:
        sections.append(_winner(run))
    sections += [Section("How to repeat it", _repeat(run))]
    if run.config:
        shown = yaml.safe_dump(without_secrets(run.config), sort_keys=False, allow_unicode=True)
        sections.append(Section("All settings", code(shown, "config")))
    lead = paragraph(f"{kind}: {state_of(run)}", "muted")
    if run.history is not None:
        lead += paragraph(what_is_searched(run.history), "muted")
    return write_page(run_dir / "report.html", name, sections, lead)


# ---------------------------------------------------------------------- a search


def _study(run: RunFolder) -> list[Section]:
    history = run.history
    if history is None or not history.trials:
        return [Section("Results", paragraph("No trial has begun yet. Write the report again when some have ended."))]
    found = [Section("Results", _headline(run, history)), Section("Timeline", _timeline(history))]
    found += [Section("Best value", _best(history)), Section("Learning curves", _curves(history))]
    if history.cost is None:
        found.append(Section("Hours saved by pruning", _saved(history)))
    found.append(Section("Which settings matter", _importance(history)))
    found.append(Section("Settings and scores", _parallel(history)))
    found.append(Section("Scores by fold", _folds(history)))
    if run.summary and run.summary.get("seed_replicates"):
        found.append(
            Section(
                "The best again, with other seeds", _seed_replicates(run.summary["seed_replicates"], history.metric)
            )
        )
    found.append(Section("Throughput and padding", _pace(history)))
    return found


def _headline(run: RunFolder, history: History) -> str:
    summary, best, savings = run.summary or {}, history.best, hours_saved(history)
    hours, counts = SearchClock(history).hours(), history.counts
    found = []
    if best is not None:
        found.append((f"{best.value:.4f}", f"best {history.metric}, mean over the folds (trial {best.number})"))
    out_of_fold = (summary.get("out_of_fold") or {}).get(history.metric)
    if out_of_fold is not None:
        found.append((f"{out_of_fold:.4f}", f"out-of-fold {history.metric}"))
    if (summary.get("test") or {}).get(history.metric) is not None:
        found.append((f"{summary['test'][history.metric]:.4f}", f"{history.metric} on the test file, scored once"))
    if summary.get("majority_baseline") is not None:
        found.append((f"{summary['majority_baseline']:.4f}", f"{history.metric} of always the same answer"))
    if summary.get("threshold") is not None:
        found.append((f"{summary['threshold']:.3f}", "decision threshold"))
    planned = "" if history.planned is None else f" of {history.planned:,}"
    found.append((f"{history.begun:,}", f"trials{planned} have ended; {counts['complete']:,} ran to their end"))
    found.append((duration(hours), "of search, while at least one trial ran"))
    if savings.trials and savings.saved:
        share = savings.saved / (savings.saved + savings.spent)
        found.append((duration(savings.saved), f"saved by pruning, {share:.0%} of the hours without it (estimate)"))
    eta = time_left(run.path)
    if eta is not None:
        span = f"{duration(eta.low / 3600)} to {duration(eta.high / 3600)}"
        found.append((duration(eta.mid / 3600), f"left; {span} in 8 cases of 10"))
    text = "" if best is not None else paragraph("No trial has run to its end yet, so that there is no best one.")
    if summary.get("threshold_note"):
        text += paragraph(f"Threshold: {summary['threshold_note']}.", "muted")
    rows = [(name, f"{number:,}") for name, number in outcome_counts(history)]
    return cards(found) + text + table(["trials", "number"], rows, (1,)) + _front(history)


def _front(history: History) -> str:
    if history.cost is None or not history.ranked:
        return ""
    from lightning_bge.advisor.report.figures.parameters import front

    text = "Each trial that ran to its end. No other trial beats one of the front in both score and cost."
    return plot(front(history), "front", text)


def _timeline(history: History) -> str:
    from lightning_bge.advisor.report.figures.curves import BARS
    from lightning_bge.advisor.report.figures.timeline import SEGMENTS, timeline

    if len(history.trials) > BARS:
        text = (
            "Each trial from its start to its end, in the lane that says how it ended; the shortest are drawn a little "
        )
        text += "longer, so as to be seen. "
    else:
        text = "Each trial from its start to its end, in the order in which they began. Colour and pattern say how it "
        text += "ended. "
    if len(history.trials) <= SEGMENTS and history.steps.folds > 1:
        text += "A gap within a bar stands between two folds. "
    if history.counts["went on"]:
        text += "A trial that went on was paused and resumed later, as one with another number."
    return plot(timeline(history), "timeline", text.strip())


def _best(history: History) -> str:
    if history.best is None:
        return paragraph("No trial has run to its end yet.")
    from lightning_bge.advisor.report.figures.timeline import best_value

    text = "Time in which at least one trial was running; pauses between two starts of the search are left out. Trials "
    text += "that were ended early are not in it, as their values are not final."
    return plot(best_value(history), "best", text)


def _curves(history: History) -> str:
    from lightning_bge.advisor.report.figures.curves import BARS, learning_curves

    if not any(trial.reports or trial.curve for trial in history.trials):
        return paragraph("No trial has reported yet.")
    if history.cost is not None:
        text = "What each validation found, fold by fold."
    elif history.steps.folds > 1:
        text = "A report is the mean over the folds so far, the last of them as far as it has come. "
    else:
        text = "The score so far, at each report. "
    if len(history.trials) > BARS:
        text += "A hatched band holds the middle 80 % of the trials at each report, as far as at least ten of them go; "
        text += "the dotted line in it is their median."
    elif history.counts["paused"] or history.counts["pruned"]:
        text += "The lines of trials that were ended early fade out before the sign at their end."
    return plot(learning_curves(history), "curves", text.strip())


def _saved(history: History) -> str:
    from lightning_bge.advisor.report.figures.curves import where_ended
    from lightning_bge.advisor.report.figures.timeline import hours

    savings = hours_saved(history)
    if not savings.trials:
        what = "No trial was ended early so far, so that nothing was saved."
        if savings.unknown:
            what = f"{savings.unknown} trials were ended early, but what they took is not recorded."
        return paragraph(what)
    text = (
        f"{savings.trials:,} trials were pruned, or paused and not resumed. Each would have made the reports that are "
        "missing, at its own mean seconds a report so far: that is what was saved. It is an estimate, as nobody knows "
        "where those folds would have stopped by themselves. Hours of trials that ran side by side are added up."
    )
    if savings.unknown:
        text += f" {savings.unknown:,} more are not counted, as their seconds are not recorded."
    ended = (
        "At which report trials ended; at 0 they ended before the first one. Those that were paused and went on are "
    )
    ended += "not in it."
    return plot(hours(history, savings), "hours", text) + plot(where_ended(history), "ended", ended)


def _importance(history: History) -> str:
    shares, note = parameter_importance(history)
    if not shares:
        return paragraph(note)
    from lightning_bge.advisor.report.figures.parameters import importance

    text = f"Share of the score's variance that each setting explains (fANOVA). {note}"
    return plot(importance(shares), "importance", text)


def _parallel(history: History) -> str:
    from lightning_bge.advisor.report.figures.parameters import ended_early, parallel

    if not any(trial.params for trial in history.trials):
        return paragraph("No trial has drawn its settings yet.")
    text = "Each trial is a line from setting to setting, down to its score. Those with the same choice are spread a "
    text += "little around it. "
    if any("when" in spec for spec in history.space.values()):
        text += "None: the trial does not use that setting. "
    if ended_early(history):
        text += "Lines of trials that were ended early stop before the score, as theirs are not final."
    elif history.counts["paused"] or history.counts["pruned"]:
        text += "Trials that were ended early are left out, as there are too many of them."
    return plot(parallel(history), "parallel", text.strip())


def _folds(history: History) -> str:
    if history.steps.folds == 1:
        return paragraph("A single split: there is one score a trial, and no spread between folds to be seen.")
    done = [trial for trial in history.ranked if trial.fold_scores]
    if not done:
        return paragraph("No trial has run to its end yet.")
    from lightning_bge.advisor.report.figures.parameters import SHOWN, fold_scores

    shown = min(len(done), SHOWN)
    text = f"The best {shown} trials, the best one first. " if shown > 1 else ""
    text += "The line is the standard deviation between the folds; trials whose means are closer than that are not "
    text += "clearly apart, though all see the same folds."
    return plot(fold_scores(history), "folds", text)


def _seed_replicates(replicates: dict[str, Any], metric: str) -> str:
    rows = []
    for one in replicates["trials"]:
        values = ", ".join("none" if value is None else f"{value:.4f}" for value in one["values"])
        mean = "not every seed has a value" if one["mean"] is None else f"{one['mean']:.4f}"
        spread = "" if one["spread"] is None else f"{one['spread']:.4f}"
        mark = "winner" if one["trial"] == replicates["winner"] else ""
        rows.append((f"trial {one['trial']}", mean, spread, values, mark))
    text = f"The same settings and folds with {len(replicates['seeds'])} other seeds: the winner has the best mean "
    text += f"{metric} over its seeds, so that it is not merely the luckiest. The first value is the search's."
    if replicates.get("missing"):
        text += f" {replicates['missing']} runs are missing, and may change the winner."
    head = ["trial", "mean", "standard deviation", "values", ""]
    return paragraph(text) + table(head, rows, (1, 2))


def _pace(history: History) -> str:
    reports = [one for trial in history.trials for fold in trial.curve for one in fold]
    text = "A search does not record tokens a second, the wait for data, or padding: lightning-bge audit measures them."
    if not reports:
        return paragraph("No trial has recorded its seconds yet.") + paragraph(text, "muted")
    from lightning_bge.advisor.report.figures.timeline import seconds_a_report

    train, val = (median(getattr(one, name) for one in reports) for name in ("train_seconds", "val_seconds"))
    what = "Medians of each trial, or of several in a row where there are very many. Over all, a report takes "
    what += f"{figure_text(train)} s of training and {figure_text(val)} s of validation. The first one of a fold holds "
    what += "the building of model and data, too."
    return plot(seconds_a_report(history), "pace", what) + paragraph(text, "muted")


# ---------------------------------------------------------------------- a training run


def _fit(run: RunFolder) -> list[Section]:
    if not run.epochs and run.summary is None:
        text = "No epoch has ended yet, or the run has another logger than Lightning's CSVLogger."
        return [Section("Results", paragraph(text))]
    return [
        Section("Results", _fit_headline(run)),
        Section("Learning curves", _fit_curves(run)),
        Section("Throughput and padding", _fit_pace(run)),
    ]


def _fit_headline(run: RunFolder) -> str:
    summary = run.summary or {}
    metric = summary.get("metric") or (run.config.get("monitor") or {}).get("metric")
    found = []
    for part, words in (("validation", "validation"), ("test", "test file, scored once")):
        value = (summary.get(part) or {}).get(metric)
        if value is not None:
            found.append((f"{value:.4f}", f"{metric}, {words}"))
    if not found and run.epochs and f"val_{metric}" in run.epochs[-1]:
        found.append((f"{run.epochs[-1][f'val_{metric}']:.4f}", f"{metric}, validation after the last epoch so far"))
    if summary.get("epoch") is not None:
        found.append((str(summary["epoch"]), "epoch that it comes from"))
    found.append((str(len(run.epochs)), "epochs trained"))
    if summary.get("threshold") is not None:
        found.append((f"{summary['threshold']:.3f}", "decision threshold"))
    names = [name for name in (summary.get("validation") or {})]
    rows = [
        (name, f"{summary['validation'][name]:.4f}", *([f"{summary['test'][name]:.4f}"] if "test" in summary else []))
        for name in names
        if "test" not in summary or name in summary["test"]
    ]
    head = ["metric", "validation", *(["test file"] if "test" in summary else [])]
    note = paragraph(f"Threshold: {summary['threshold_note']}.", "muted") if summary.get("threshold_note") else ""
    return cards(found) + note + (table(head, rows, (1, 2)) if rows else "")


def _fit_curves(run: RunFolder) -> str:
    if not run.epochs:
        return paragraph(
            "There is no logs/version_*/metrics.csv: the run has another logger than Lightning's CSVLogger."
        )
    from lightning_bge.advisor.report.figures.fit import by_epoch

    logged = {name for epoch in run.epochs for name in epoch}
    metric = f"val_{(run.summary or {}).get('metric') or (run.config.get('monitor') or {}).get('metric')}"
    others = sorted(name for name in logged if name.startswith("val_") and name not in (metric, "val_loss"))
    losses = [name for name in ("train_loss", "val_loss") if name in logged]
    found = ""
    if losses:
        text = "The loss in training, with dropout, and in validation, without."
        found += plot(by_epoch(run.epochs, losses, "loss"), "losses", text)
    if names := [name for name in (metric, *others) if name in logged][: 1 + FEW]:
        text = "Validation after each epoch; the thick line is what the run is judged by."
        found += plot(by_epoch(run.epochs, names, "validation"), "metrics", text)
    return found


def _fit_pace(run: RunFolder) -> str:
    logged = [epoch for epoch in run.epochs if "train_tokens_per_s" in epoch]
    if not logged:
        return paragraph("Tokens a second are not recorded: the callback Throughput was not there.")
    from lightning_bge.advisor.report.figures.fit import by_epoch

    text = "Real tokens a second in training; padding is not counted."
    for name, words in (
        ("train_data_wait", "Waiting for data took at most {:.1%} of an epoch's training."),
        ("train_padding", "At most {:.1%} of the computed tokens of an epoch were padding."),
    ):
        shares = [epoch[name] for epoch in logged if name in epoch]
        text += f" {words.format(max(shares))}" if shares else f" {name} is not recorded."
    used = [epoch["train_utilisation"] for epoch in logged if "train_utilisation" in epoch]
    if used:
        text += f" The matrix products reached {median(used):.0%} of the machine's measured peak (median epoch)."
    return plot(by_epoch(logged, ["train_tokens_per_s"], "tokens a second"), "tokens", text)


# ---------------------------------------------------------------------- of both


def _scorecard(run: RunFolder) -> Section:
    if run.audit is not None:
        return Section("Scorecard", audit_section(run.audit))
    command = f"lightning-bge audit -c {shlex.quote(str(run.path / 'config.yaml'))}"
    text = "What is really in effect, and what is still to be gained, is not known yet: this command measures it."
    return Section("Scorecard", paragraph(text) + code(command, "audit"))


def _winner(run: RunFolder) -> Section:
    assert run.best is not None
    found = ""
    params = (run.summary or {}).get("best_params") or {}
    if params:
        shown = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in params.items()}
        rows = list(without_secrets(shown).items())
        found += table(["searched setting", "best value"], rows)
    found += f"<p>All settings of the winner, for <code>lightning-bge fit -c {html.escape('best.yaml')}</code>:</p>"
    return Section("The winner's settings", found + code(run.best, "winner"))


def _repeat(run: RunFolder) -> str:
    if not run.calls:
        return paragraph("There is no run.json in the folder, so that command, versions and seeds are not known.")
    last = run.calls[-1]
    command = shlex.join(clean_command([Path(word).name if i == 0 else word for i, word in enumerate(last["command"])]))
    rows = [
        ("started", str(last.get("started"))),
        ("folder", str(last.get("folder"))),
        ("seed", str(last.get("seed"))),
        ("data hash", str(last.get("data_hash"))),
        ("model", str(without_secrets(last.get("model")))),
        ("model revision", str(last.get("model_revision") or "a folder, or not known")),
        ("git commit", str(last.get("git_commit") or "not in a checkout")),
        ("Python", str(last.get("python"))),
        ("platform", str(last.get("platform"))),
        *((name, str(version)) for name, version in (last.get("versions") or {}).items()),
    ]
    text = f"Started {len(run.calls)} times; the last time:" if len(run.calls) > 1 else "Started once:"
    return paragraph(text) + code(command, "command") + table(["what", "value"], rows)
