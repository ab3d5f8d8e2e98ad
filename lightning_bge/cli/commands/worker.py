"""`lightning-bge worker RUN`: one more process for a study."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_bge.cli.arguments import PlainParser, check_run
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.cli.search_options import check_one_device, options_of_study, starting_again, study_cli
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.journal import shared_storage_of
from lightning_bge.hpo.outer_folds import run_studies
from lightning_bge.hpo.run import follow, run_hpo
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.hpo.trial.ranks import OUT_OF_MEMORY, RankGroup
from lightning_bge.runtime.oom import find_oom
from lightning_bge.runtime.run_folder import read_config, read_json
from lightning_bge.runtime.stop import SIGNALS

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
    parser.add_argument("--rank", type=int, metavar="K", help="Train trials together with the worker that started it.")
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
    accelerator = cli.trainer.strategy.root_device.type
    if chosen.rank is not None:
        _follow(cli, RankGroup.join(chosen.rank, chosen.parent, accelerator))
        return
    with starting_again(), running(cli.trainer):
        hpo = options_of_study(cli)
        if chosen.parent is None:
            check_one_device(cli, "`lightning-bge hpo` starts the processes of several devices: run that once more")
            run_studies(cli.experiment, hpo, joins=True)
            return
        # that process starts workers for one study after the other
        with ranks_of(cli.trainer.world_size, folder, chosen.share, accelerator) as ranks:
            run_hpo(cli.experiment, hpo, joins=True, parent=chosen.parent, ranks=ranks)


@contextmanager
def ranks_of(size: int, folder: Path, share: int, accelerator: str) -> Iterator[RankGroup | None]:
    """The processes that train each trial with this one, while it runs trials; None: there is one device."""
    if size == 1:
        yield None
        return
    arguments = ["worker", str(folder), "--share", str(share), "--parent", str(os.getpid())]
    ranks = RankGroup.lead(size, arguments, accelerator)
    try:
        yield ranks
    finally:
        ranks.close()


def _follow(cli: BGECLI | ModuleCLI, ranks: RankGroup) -> None:
    """Train with the first process, and tell it by the exit status where memory has run out."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the first process stops, and ends this one
    try:
        follow(cli.experiment, options_of_study(cli), ranks)
    except Exception as error:
        if find_oom(error) is None:
            raise
        raise SystemExit(OUT_OF_MEMORY) from error


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
