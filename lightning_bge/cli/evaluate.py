"""What `validate` and `test` share."""

from collections.abc import Mapping
from typing import Literal

from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.preflight import preflight


def evaluate(command: Literal["validate", "test"], args: list[str], description: str) -> None:
    """Run the trainer's method of that name, which prints the metrics."""
    cli = BGECLI(command, args, description=description)
    with running(cli.trainer, keeps=False):
        preflight(command, cli.experiment)
        getattr(cli.trainer, command)(cli.model, datamodule=cli.datamodule)


def without_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    """`val_f1` -> `f1`."""
    return {name.split("_", 1)[1]: float(value) for name, value in metrics.items()}
