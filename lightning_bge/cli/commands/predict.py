"""`lightning-bge predict`: a score and a label for each row of a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.models.ensemble import average_predictions, ensemble_members, member_module
from lightning_bge.models.output.prediction_file import write_predictions
from lightning_bge.preflight import preflight


def run(args: list[str]) -> None:
    """Write the predictions of an exported model as CSV."""
    description = "Write a score and a label for each row of data.predict_file as a CSV file. The score of an exported "
    description += "ensemble is the mean of its models' scores."
    cli = BGECLI("predict", args, description=description, add_arguments=_add_arguments)
    with running(cli.trainer):
        preflight("predict", cli.experiment, outputs={"output": cli.config_init.output})
        members = ensemble_members(Path(cli.model.name_or_path).expanduser())
        models: list[Any] = [member_module(cli.model, member) for member in members] or [cli.model]
        for model in models:
            cli.trainer.predict(model, datamodule=cli.datamodule, return_predictions=False)
        if cli.trainer.is_global_zero:
            predictions = average_predictions(models[0].task, [model.predictions for model in models])
            output = Path(cli.config_init.output).expanduser()
            output.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(output, models[0].schema, replace(predictions, labels=None))
            print(f"{len(predictions.rows)} rows: {cli.config_init.output}")


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("--output", type=str, default="predictions.csv", help="The CSV file to write.")
