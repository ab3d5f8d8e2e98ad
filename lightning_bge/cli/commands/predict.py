"""`lightning-bge predict`: a score and a label for each row of a file."""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.models.ensemble import ensemble_members, member_module
from lightning_bge.prediction.predict import describe_reasons, predict_files
from lightning_bge.preflight import preflight
from lightning_bge.runtime.memory import limit_primitive_caches
from lightning_bge.runtime.output_file import is_stream

DESCRIPTION = """Write a score and a label for each row of data.predict_file. The score of an exported ensemble is the
mean of its models' scores. Rows that can't be scored, such as those with an empty text, have no score and a reason. An
interrupted run is continued by the same command."""
OUTPUT = """The file to write: .csv, .tsv, .jsonl or .parquet, the first three also with .gz, .bz2 or .zst behind. A
device or a pipe, such as /dev/stdout, is written to as CSV, or as the ending says; such a run can't be continued."""
KEEP = """Columns of the input to carry over, such as '[id, group]'; '[]': none. Unset: all but the texts. A name that
the output uses itself (row, file, score, label, reason, truth) gets the prefix input_."""


def run(args: list[str]) -> None:
    """Write the predictions of an exported model."""
    limit_primitive_caches()
    cli = BGECLI("predict", args, description=" ".join(DESCRIPTION.split()), add_arguments=_add_arguments)
    output = cli.config_init.output
    stream = is_stream(output)
    with running(cli.trainer, keeps=not stream), redirect_stdout(sys.stderr) if stream else nullcontext():
        preflight("predict", cli.experiment, outputs={"output": output})
        members = ensemble_members(Path(cli.model.name_or_path).expanduser())
        models: list[Any] = [member_module(cli.model, member) for member in members] or [cli.model]
        rows, reasons = predict_files(cli.trainer, models, cli.datamodule, output=output, keep=cli.config_init.keep)
        if cli.trainer.is_global_zero:
            print(f"{rows} rows: {output}")
            if reasons:
                print(describe_reasons(rows, reasons))


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("--output", type=str, default="predictions.csv", help=" ".join(OUTPUT.split()))
    parser.add_argument("--keep", type=list[str] | None, default=None, help=" ".join(KEEP.split()))
