"""`lightning-bge test`: the metrics on the test file."""

from lightning_bge.cli.evaluate import evaluate


def run(args: list[str]) -> None:
    """Print the metrics of a model on the test file."""
    evaluate("test", args, "Compute the metrics of a model (an exported folder) on data.test_file.")
