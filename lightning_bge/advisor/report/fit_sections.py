"""The sections of a training run's report: results, learning curves, throughput."""

import html
from collections.abc import Sequence
from statistics import median

import plotly.graph_objects as go

from lightning_bge.advisor.html.page import Section, cards, paragraph, plot, table
from lightning_bge.advisor.report.figure_style import SERIES, figure, integer_ticks, rounded
from lightning_bge.advisor.report.run_data import RunData

MAX_METRICS = len(SERIES)  # validation metrics that are drawn

PARTS = {"validation": "validation", "test": "test file, evaluated once"}


def fit_sections(run: RunData) -> list[Section]:
    """The sections of a training run, as far as its files have content for them."""
    if not run.epochs and run.summary is None:
        text = "No epoch has finished yet, or the run uses another logger than Lightning's CSVLogger."
        return [Section("Results", paragraph(text))]
    return [
        Section("Results", _results(run)),
        Section("Learning curves", _learning_curves(run)),
        Section("Throughput and padding", _throughput(run)),
    ]


def _results(run: RunData) -> str:
    summary, metric = run.summary or {}, run.metric
    figures = []
    for part, text in PARTS.items():
        found = summary.get(part) or {}
        value = found.get(run.logged.removeprefix("val_"), found.get(metric))  # the test file's is at the threshold
        if value is not None:
            figures.append((f"{value:.4f}", f"{metric}, {text}"))
    if not figures and run.epochs and run.logged in run.epochs[-1]:
        figures.append((f"{run.epochs[-1][run.logged]:.4f}", f"{metric}, validation after the last epoch so far"))
    if summary.get("epoch") is not None:
        figures.append((str(summary["epoch"]), "epoch of the chosen checkpoint"))
    figures.append((str(len(run.epochs)), "epochs trained"))
    if summary.get("threshold") is not None:
        figures.append((f"{summary['threshold']:.3f}", "decision threshold"))
    if summary.get("majority_baseline") is not None:
        figures.append((f"{summary['majority_baseline']:.4f}", f"{metric} of the same answer for every row"))
    if summary.get("positive_label") is not None:
        figures.append((summary["positive_label"], "positive label"))
    warnings = "".join(paragraph(f"Warning: {warning}.") for warning in summary.get("warnings", []))
    note = paragraph(f"Threshold: {summary['threshold_note']}.", "muted") if summary.get("threshold_note") else ""
    parts = [summary[part] for part in ("validation", "test") if summary.get(part)]
    names = [name for name in (parts[0] if parts else ()) if all(name in part for part in parts)]
    rows = [(name, *(f"{part[name]:.4f}" for part in parts)) for name in names]
    head = ["metric", *(title for part, title in PARTS.items() if summary.get(part))]
    return cards(figures) + warnings + note + (table(head, rows, (1, 2)) if rows else "")


def _learning_curves(run: RunData) -> str:
    if not run.epochs:
        return paragraph("logs/version_*/metrics.csv is missing: the run used another logger than CSVLogger.")
    logged = {name for epoch in run.epochs for name in epoch}
    metric = run.logged
    others = sorted(name for name in logged if name.startswith("val_") and name not in (metric, "val_loss"))
    losses = [name for name in ("train_loss", "val_loss") if name in logged]
    found = ""
    if losses:
        text = "The training loss is computed with dropout, the validation loss without."
        found += plot(_by_epoch(run.epochs, losses, "loss"), "losses", text)
    if names := [name for name in (metric, *others) if name in logged][:MAX_METRICS]:
        text = "Validation metrics after each epoch; the thick line is the monitored metric."
        found += plot(_by_epoch(run.epochs, names, "validation"), "metrics", text)
    return found


def _throughput(run: RunData) -> str:
    logged = [epoch for epoch in run.epochs if "train_tokens_per_s" in epoch]
    if not logged:
        return paragraph("Tokens per second are not recorded: the run had no throughput callback.")
    text = "Tokens per second in training, without padding."
    for name, sentence in (
        ("train_data_wait", "Waiting for data took at most {:.1%} of the training time of an epoch."),
        ("train_padding", "At most {:.1%} of the computed tokens of an epoch were padding."),
    ):
        shares = [epoch[name] for epoch in logged if name in epoch]
        text += f" {sentence.format(max(shares))}" if shares else f" {name} is not recorded."
    used = [epoch["train_utilisation"] for epoch in logged if "train_utilisation" in epoch]
    if used:
        text += f" Matrix products reached {median(used):.0%} of the measured peak of this machine (median epoch)."
    return plot(_by_epoch(logged, ["train_tokens_per_s"], "tokens per second"), "tokens", text)


def _by_epoch(epochs: Sequence[dict[str, float]], names: Sequence[str], title: str) -> go.Figure:
    """Logged metrics by epoch; the first is drawn thicker. An epoch without a metric is left out of its line."""
    fig = figure(320, {"title": "epoch", **integer_ticks(1, len(epochs))}, {"title": title})
    for name, mark in zip(names, SERIES, strict=False):
        logged = [epoch for epoch in epochs if name in epoch]
        fig.add_scatter(
            x=[int(epoch["epoch"]) + 1 for epoch in logged],
            y=rounded([epoch[name] for epoch in logged]),
            mode="lines+markers" if len(logged) <= 60 else "lines",
            name=html.escape(name),
            line={"color": mark.color, "dash": mark.dash, "width": 3 if name == names[0] else 1.5},
            marker={"symbol": mark.symbol, "size": 8},
            hovertemplate=f"{html.escape(name)}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    return fig
