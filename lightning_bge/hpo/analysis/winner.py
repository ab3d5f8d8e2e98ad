"""What `summary.json` says of the winner's scores, in sentences and as the rows of a table."""

from typing import Any

AGAINST = {"runner_up": "the second best", "configured": "the configured hyperparameters", "majority": "a constant"}
SELECTED = "optimistic: it has chosen the winner"
CORRECTED = "on rows that did not choose it"
TEST = "test file, scored once"
OUTER = "rows of the outer fold, scored once"
DIFFERENCES = "advantage of the winner, on rows that did not choose it (95 % interval)"


def describe_scores(summary: dict[str, Any]) -> list[str]:
    """Lines about the selected score, the corrected one and that of the test file, and what the winner is better than.

    Args:
        summary: the content of `summary.json`.
    """
    metric, estimate = summary["metric"], summary.get("estimate") or {}
    lines = [f"{metric} of the winner, trial {summary['best_trial']}:"]
    lines.append(f"  selected   {summary['best_value']:.4f}  mean over the folds; {SELECTED}")
    if corrected := estimate.get("corrected"):
        low, high = corrected["low"], corrected["high"]
        lines.append(f"  corrected  {corrected['value']:.4f}  95 % interval {low:.4f} to {high:.4f}; {CORRECTED}")
    if metric in summary.get("test", {}):
        lines.append(f"  test       {summary['test'][metric]:.4f}  {tested_rows(summary)}")
    if nested := summary.get("nested"):
        lines += describe_nested(nested)
    lines += describe_notes(summary)
    if rows := difference_rows(estimate):
        lines.append(f"{DIFFERENCES}:")
        lines += [f"  {name:<32}{value}  ({interval})  {verdict}" for name, value, interval, verdict in rows]
    return lines


def tested_rows(summary: dict[str, Any]) -> str:
    """Which rows the exported model was tested on."""
    return OUTER if summary.get("test_file", "") is None else TEST


def describe_price(n_outer_folds: int) -> str:
    """What nested cross-validation costs."""
    return (
        f"nested cross-validation: {n_outer_folds} inner studies before the final one, about {n_outer_folds + 1} times "
        "the hours"
    )


def describe_nested(found: dict[str, Any]) -> list[str]:
    """Lines about the score of nested cross-validation, and its price."""
    value, n = found["value"], found["n_outer_folds"]
    if value is None:
        return ["  nested     has no value: a model has diverged, or the outer folds lack a class"]
    low, high = found["low"], found["high"]
    return [
        f"  nested     {value:.4f}  95 % interval {low:.4f} to {high:.4f}; {found['how']}, which no choice has seen",
        f"             price: {n} inner studies, about {n + 1} times the hours of one study",
    ]


def describe_notes(summary: dict[str, Any]) -> list[str]:
    """What the corrected score does not correct, and what it lacks, one sentence a line, without a full stop."""
    estimate, sampler = summary.get("estimate") or {}, summary["sampler"]
    lines = []
    if summary.get("out_of_fold", {}) is None:
        lines.append("no corrected score: a module of another project keeps no predictions")
    elif summary["metric"] == "loss":
        lines.append("no corrected score: monitor another metric than the loss")
    elif summary.get("metric_class"):
        lines.append("no corrected score: a metric by class_path is not computed on resamples; monitor one with a name")
    elif "corrected" in estimate and estimate["corrected"] is None:
        lines.append(f"no corrected score: too few rows for {summary['metric']}, as no resample has every class")
    elif not estimate.get("corrected"):
        lines.append("no corrected score: the predictions of the complete trials are not kept (hpo.predictions_gb)")
    elif sampler not in ("random", "grid", "qmc"):
        lines.append(f"not corrected: {sampler} has drawn later parameter sets by the scores of earlier ones")
    if left_out := estimate.get("n_left_out"):
        lines.append(f"left out of the correction: {left_out} parameter sets whose predictions are not kept")
    return lines


def difference_rows(estimate: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What the winner is compared with, by how much it is better, the interval of that, and whether it is noise."""
    rows = []
    for name, found in estimate.get("differences", {}).items():
        sure = "better" if found["value"] > 0 else "worse"
        interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
        verdict = sure if found["excludes_zero"] else "no more than noise"
        rows.append((AGAINST[name], f"{found['value']:+.4f}", interval, verdict))
    return rows
