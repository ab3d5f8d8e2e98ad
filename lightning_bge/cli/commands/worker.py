"""`lightning-bge worker RUN`: one more process for a study."""

import os
from pathlib import Path
from typing import Any

import torch

from lightning_bge.cli.arguments import PlainParser, check_run
from lightning_bge.cli.lightning_cli import running
from lightning_bge.cli.search_options import options_of_study, starting_again, study_cli
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.journal import shared_storage_of
from lightning_bge.hpo.outer_folds import run_studies
from lightning_bge.hpo.run import run_hpo
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.runtime.run_folder import read_config, read_json

DESCRIPTION = """Join the study of a run folder with one more process, with the options that `lightning-bge hpo` has
written there. It runs trials until nothing is left to do; whichever process is the last ends the study."""


def run(args: list[str]) -> None:
    """Run what is missing of the study, together with other processes."""
    parser = PlainParser(prog="lightning-bge worker", description=DESCRIPTION)
    parser.add_argument("run", type=Path, help="The run's folder.")
    parser.add_argument("--timeout", type=float, metavar="S", help="Start no further trial after S seconds.")
    parser.add_argument(
        "--share", type=int, default=1, metavar="K", help="K processes share this one's device, and its memory."
    )
    parser.add_argument("--parent", type=int, metavar="PID", help="Stop when this process, which started it, is gone.")
    chosen = parser.parse_args(args)
    check_run(chosen.run)
    folder = chosen.run.expanduser().resolve()
    config = folder / "config.yaml"
    if not config.is_file() or not ((folder / JOURNAL).is_file() or shared_storage_of(folder)):
        raise ConfigError(f"{chosen.run}: expected the run folder of a study that `lightning-bge hpo` has started")
    if "build" in read_config(folder):
        raise ConfigError(
            f"{chosen.run}: expected a study of `lightning-bge hpo`, got one that `tune` has started with a function. "
            "Call tune in one more process"
        )
    _enter(folder)
    quiet_optuna()
    options = ["-c", str(config), "--run_dir", str(folder), *_memory(chosen.share)]
    options += [] if chosen.timeout is None else ["--hpo.timeout", str(chosen.timeout)]
    cli = study_cli(options, description=DESCRIPTION)
    with starting_again(), running(cli.trainer):
        hpo = options_of_study(cli)
        if chosen.parent is None:
            run_studies(cli.experiment, hpo, joins=True)
        else:  # that process starts workers for one study after the other
            run_hpo(cli.experiment, hpo, joins=True, parent=chosen.parent)


def _enter(folder: Path) -> None:
    """Go to the folder in which the study was started: the paths of its files may be relative to it."""
    calls: list[Any] = (read_json(folder / "run.json") or {}).get("calls", [])
    place = calls[-1]["folder"] if calls else None
    if place is not None and Path(place).is_dir():
        os.chdir(place)


def _memory(share: int) -> list[str]:
    """The option with this process's share of a GPU's memory."""
    if share < 1:
        raise ConfigError(f"--share: expected 1 or more, got {share}")
    if share == 1 or not torch.cuda.is_available():
        return []
    total = torch.cuda.get_device_properties(0).total_memory
    return ["--memory.limit_gb", f"{total / share / 2**30:.3f}"]
