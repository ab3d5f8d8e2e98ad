"""`lightning-bge status RUN`: the progress of a run, in the terminal."""

from pathlib import Path

from lightning_bge.advisor.report.status import describe_failures, describe_status, watch_status
from lightning_bge.cli.arguments import PlainParser
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.paths import check_path


def run(args: list[str]) -> None:
    """Print it once, or every N seconds."""
    parser = PlainParser(
        prog="lightning-bge status",
        description="Show the progress of a search or a training run: finished trials, the best value, the time left.",
    )
    parser.add_argument("run", type=Path, help="The run's folder.")
    parser.add_argument("--watch", type=float, metavar="N", help="Print it every N seconds until the run has ended.")
    parser.add_argument("--failures", action="store_true", help="Show why each failed trial has failed.")
    chosen = parser.parse_args(args)
    check_path("RUN", chosen.run)
    folder = chosen.run.expanduser()
    if chosen.failures:
        print(describe_failures(folder))
    elif chosen.watch is None:
        print(describe_status(folder))
    elif chosen.watch > 0:
        watch_status(folder, chosen.watch)
    else:
        raise ConfigError(f"--watch: expected more than 0 seconds, got {chosen.watch:g}")
