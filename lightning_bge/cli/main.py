"""`lightning-bge`: turns YAML and flags into objects and calls the rooms."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_bge.advisor.report.report import write_report
from lightning_bge.advisor.report.status import describe_status, watch_status
from lightning_bge.cli.lightning_cli import BGECLI, explain
from lightning_bge.data.sample import write_sample
from lightning_bge.data.tables.readers import TableConfig, read_table
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.objective import INTERRUPTED
from lightning_bge.hpo.study import MemoryKeptError, quiet_optuna
from lightning_bge.models.tiny_bert import build_tiny_bert
from lightning_bge.runtime.distributed import AnotherRankFailed
from lightning_bge.runtime.memory import spare_address_space
from lightning_bge.runtime.run_folder import create_run_dir

log = logging.getLogger("lightning_bge")


DESCRIPTION = """Fine-tune and tune BGE text encoders: fast by default.

Other commands, each with a --help of its own:
`lightning-bge sample FOLDER` writes generated text pairs and a small model to try everything with; it needs no network.
`lightning-bge report RUN` writes RUN/report.html: what a search or a training run found, in one file to keep or send.
`lightning-bge status RUN` says how it stands, also while it runs; `--watch 5` says so every five seconds.
"""


def main(args: list[str] | None = None) -> None:
    """Run the program; a user's mistake ends with one message and status 2, Ctrl-C with 130."""
    given = sys.argv[1:] if args is None else args
    _quieten()
    spare_address_space()
    try:
        if given and given[0] in OTHERS:
            OTHERS[given[0]](given[1:])
        else:
            BGECLI(args=args, parser_kwargs={"prog": "lightning-bge", "description": DESCRIPTION})
    except MemoryKeptError as error:
        if args is not None:
            _leave(str(error), 2)
        print(f"lightning-bge: {error}. Doing so", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except AnotherRankFailed as other:
        raise SystemExit(other.status) from None
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        _leave(explanation, 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # 1 is what Lightning's `fit` makes of Ctrl-C
        if isinstance(stop, SystemExit) and stop.code not in (1, INTERRUPTED):
            raise
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            raise SystemExit(INTERRUPTED) from None
        _leave("interrupted. What is finished is kept: the same command goes on from there", INTERRUPTED)


def _leave(text: str, status: int) -> None:
    print(f"lightning-bge: {text}", file=sys.stderr)
    raise SystemExit(status)


def _quieten() -> None:
    """Our own messages on stderr, and of the libraries' only those that a user of this program can act on."""
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: " * (rank > 0) + "%(message)s", force=True)
    log.setLevel(logging.WARNING if rank else logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet_optuna()
    for pattern in (
        ".*does not have many workers.*",  # rows are tokenised and in memory: 0 workers are the fastest
        ".*Checkpoint directory .* exists and is not empty.*",  # a run folder that is gone on with
        ".*number of training batches.*smaller than the logging interval.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6.6 under torch 2.13
    ):
        warnings.filterwarnings("ignore", pattern)


def make_sample(args: list[str]) -> None:
    """`lightning-bge sample FOLDER`: `train.csv`, `test.csv` and `model/`."""
    parser = ArgumentParser(
        prog="lightning-bge sample", description="Write generated text pairs and a small BERT with its own tokenizer."
    )
    parser.add_argument("folder", help="Where to; train.csv, test.csv and model/ are written there.")
    parser.add_argument("--seed", type=int, default=0, help="Of the texts and the model's weights.")
    chosen = parser.parse_args(args)
    folder = create_run_dir(chosen.folder)
    write_sample(folder, seed=chosen.seed)
    rows = read_table(folder / "train.csv", ("text", "criterion"), None, None, TableConfig())
    build_tiny_bert(folder / "model", [text for row in rows.texts for text in row], seed=chosen.seed)
    print(f"{folder}: train.csv, test.csv, model/")


def make_report(args: list[str]) -> None:
    """`lightning-bge report RUN`: `RUN/report.html`."""
    parser = ArgumentParser(
        prog="lightning-bge report",
        description="Write RUN/report.html: the figures, plots and settings of a search or a training run, finished or "
        "not, in one file that needs no network. It shows no texts, and no passwords.",
    )
    parser.add_argument("run", type=Path, help="The run's folder.")
    print(write_report(parser.parse_args(args).run.expanduser()))


def show_status(args: list[str]) -> None:
    """`lightning-bge status RUN`: how it stands, on the terminal."""
    parser = ArgumentParser(
        prog="lightning-bge status",
        description="Say how a search or a training run stands: what is done, what is best, when it will end.",
    )
    parser.add_argument("run", type=Path, help="The run's folder.")
    parser.add_argument("--watch", type=float, metavar="N", help="Say so every N seconds, until the run has ended.")
    chosen = parser.parse_args(args)
    run = chosen.run.expanduser()
    if chosen.watch is None:
        print(describe_status(run))
    elif chosen.watch > 0:
        watch_status(run, chosen.watch)
    else:
        raise ConfigError(f"--watch: expected more than 0 seconds, got {chosen.watch:g}")


# commands without model, data and trainer
OTHERS: dict[str, Callable[[list[str]], None]] = {
    "sample": make_sample,
    "report": make_report,
    "status": show_status,
}
