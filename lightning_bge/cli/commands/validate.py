"""`lightning-bge validate`: the metrics on the validation rows."""

from lightning_bge.cli.evaluate import evaluate


def run(args: list[str]) -> None:
    """Print the metrics of a model on the validation rows."""
    evaluate("validate", args, "Compute the metrics of a model (an exported folder) on the validation rows.")
