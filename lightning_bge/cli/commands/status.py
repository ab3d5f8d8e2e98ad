"""`lightning-bge status RUN`: the progress of a run, in the terminal."""

from functools import partial
from pathlib import Path

from lightning_bge.advisor.report.run_data import read_run, read_shared_run
from lightning_bge.advisor.report.status import describe_failures, describe_status, watch_status
from lightning_bge.cli.arguments import PlainParser, check_run
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.storage.url import parse_storage


def run(args: list[str]) -> None:
    """Print it once, or every N seconds."""
    parser = PlainParser(
        prog="lightning-bge status",
        description="Show the progress of a search or a training run: finished trials, the best value, the time left.",
    )
    parser.add_argument("run", type=Path, help="The run's folder; with --storage the study's name (hpo.study_name).")
    parser.add_argument("--storage", metavar="URL", help="Read the study from this storage alone, on any machine.")
    parser.add_argument("--watch", type=float, metavar="N", help="Print it every N seconds until the run has ended.")
    parser.add_argument("--failures", action="store_true", help="Show why each failed trial has failed.")
    chosen = parser.parse_args(args)
    if chosen.storage is None:
        check_run(chosen.run)
        read = partial(read_run, chosen.run.expanduser())
    else:
        read = partial(read_shared_run, parse_storage(chosen.storage, "--storage").text, str(chosen.run))
    if chosen.failures:
        print(describe_failures(read()))
    elif chosen.watch is None:
        print(describe_status(read()))
    elif chosen.watch > 0:
        watch_status(read, chosen.watch)
    else:
        raise ConfigError(f"--watch: expected more than 0 seconds, got {chosen.watch:g}")
