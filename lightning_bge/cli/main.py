"""`lightning-bge`: finds the command and runs it. Nothing is imported before it is needed."""

import difflib
import importlib
import importlib.metadata
import logging
import os
import sys
from typing import NoReturn

from lightning_bge.cli.explain import explain
from lightning_bge.cli.missing_files import check_files
from lightning_bge.errors import INTERRUPTED, PIPE_CLOSED

log = logging.getLogger("lightning_bge")

# Each has a module of its name in the package `commands`, with a function `run(args)`.
COMMANDS = {
    "fit": "train one model; an interrupted run continues from its last checkpoint",
    "hpo": "search for the best hyperparameters, prune bad trials, refit and export the best model",
    "worker": "join the study of a run folder with one more process",
    "plan": "estimate how many hours a search takes, before it is started",
    "audit": "train a few steps: which optimizations are in effect, and what could still be gained",
    "predict": "write a score and a label for each row of a file",
    "validate": "compute the metrics of a model on the validation rows",
    "test": "compute the metrics of a model on the test file",
    "status": "show the progress of a run, its best value and the time left",
    "report": "write RUN/report.html: results, plots and how to repeat the run",
    "dashboard": "show the study of a run in a browser, with Optuna Dashboard",
    "cache": "list or clear what is kept for later runs: tokenized texts, micro-batch sizes",
    "proxy": "serve a database to hundreds of workers through Optuna's gRPC proxy",
    "sample": "write generated text pairs and a small model to try everything without a network",
}


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Exit status: 0 on success, 2 after an error that the user can fix (one message on stderr), 130 after Ctrl-C, 141
    where the program that reads standard output has ended, as `head` does.

    Args:
        args: the command and its arguments; None: those of the process.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell, as by `>&-`
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(describe_commands())
        return
    if name == "--version":
        print(f"lightning-bge {importlib.metadata.version('lightning-bge')}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"Did you mean {near[0]}?" if near else "`lightning-bge --help` lists the commands."
        _exit(f"expected a command, got {name}. {fix}", 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    try:
        check_files(rest)
        importlib.import_module(f"lightning_bge.cli.commands.{name}").run(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        raise SystemExit(PIPE_CLOSED) from None
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        _exit(explanation, 2)
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)


def describe_commands() -> str:
    """The text of `lightning-bge --help`."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-bge COMMAND [options]",
            "",
            "Fine-tune and tune BGE text encoders with PyTorch Lightning and Optuna: fast by default.",
            "",
            *lines,
            "",
            "`lightning-bge COMMAND --help` lists the options of a command, `lightning-bge --version` the version.",
            "fit, hpo, plan, audit, predict, validate and test read YAML files (-c FILE), which options override.",
        ]
    )


def _exit(text: str, status: int) -> NoReturn:
    print(f"lightning-bge: {text}", file=sys.stderr)
    raise SystemExit(status)
