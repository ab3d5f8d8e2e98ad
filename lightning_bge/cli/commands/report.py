"""`lightning-bge report RUN`: writes `RUN/report.html`."""

from pathlib import Path

from lightning_bge.advisor.report.report import write_report
from lightning_bge.cli.arguments import PlainParser, check_run


def run(args: list[str]) -> None:
    """Write the report and print its path."""
    parser = PlainParser(
        prog="lightning-bge report",
        description="Write RUN/report.html: the results, plots and configuration of a search or a training run, "
        "finished or not, in one file that needs no network. It contains no texts of the data, and no passwords.",
    )
    parser.add_argument("run", type=Path, help="The run's folder.")
    chosen = parser.parse_args(args)
    check_run(chosen.run)
    print(write_report(chosen.run.expanduser()))
