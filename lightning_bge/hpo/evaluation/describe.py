"""What a user reads about the winner's scores, in the closing words of a study."""

from typing import Any

AGAINST = {"runner_up": "the second best", "configured": "the configured hyperparameters", "majority": "a constant"}
SELECTED = "optimistic: it has chosen the winner"
CORRECTED = "on rows that did not choose it"
TEST = "test file, scored once"


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
        lines.append(f"  test       {summary['test'][metric]:.4f}  {TEST}")
    return [*lines, *describe_notes(summary), *_describe_differences(estimate.get("differences", {}))]


def describe_notes(summary: dict[str, Any]) -> list[str]:
    """What the corrected score does not correct, and what it lacks."""
    estimate, sampler = summary.get("estimate") or {}, summary["sampler"]
    lines = []
    if summary["metric"] == "loss":
        lines.append("no corrected score: monitor another metric than the loss")
    elif not estimate.get("corrected"):
        lines.append("no corrected score: the predictions of the complete trials are not kept (hpo.predictions_gb)")
    elif sampler not in ("random", "grid", "qmc"):
        lines.append(f"not corrected: {sampler} has drawn later parameter sets by the scores of earlier ones")
    if left_out := estimate.get("n_left_out"):
        lines.append(f"left out of the correction: {left_out} parameter sets whose predictions are not kept")
    return lines


def _describe_differences(differences: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, found in differences.items():
        text = describe_difference(found)
        lines.append(
            f"  {AGAINST[name]:<32}{found['value']:+.4f}  ({found['low']:+.4f} to {found['high']:+.4f})  {text}"
        )
    return ["better than, on rows that did not choose the winner (95 % interval):", *lines] if lines else []


def describe_difference(found: dict[str, Any]) -> str:
    """Whether a difference is more than noise."""
    if not found["excludes_zero"]:
        return "no more than noise"
    return "better" if found["value"] > 0 else "worse"
