"""`lightning-bge hpo`: a study with Optuna, its refit and its export."""

import os
import sys

from lightning_bge.advisor.report.report import write_report
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.search_options import add_hpo, check_one_device
from lightning_bge.hpo.run import run_hpo
from lightning_bge.hpo.study import MemoryKeptError, quiet_optuna

DESCRIPTION = """Search for the best hyperparameters over folds, prune bad trials, refit the best ones on all rows, and
export the model. An interrupted study continues when the same command is run again."""


def run(args: list[str]) -> None:
    """Run the study of the run folder, or what is missing of it."""
    quiet_optuna()
    cli = BGECLI("hpo", args, description=DESCRIPTION, add_arguments=add_hpo)
    try:
        with running(cli.trainer):
            _hpo(cli)
    except MemoryKeptError as error:
        print(f"lightning-bge: {error}. The process starts itself again", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _hpo(cli: BGECLI) -> None:
    check_one_device(
        cli,
        "To use more, start this command once for each device, with its own CUDA_VISIBLE_DEVICES and the same "
        "--run_dir: these processes share the study",
    )
    _, summary = run_hpo(cli.experiment, cli.config_init.hpo)
    if summary is not None:
        print(f"  {write_report(cli.run_dir).name:<14}the whole study on one page, for a browser")
