"""`lightning-bge dashboard RUN`: Optuna Dashboard on the study of a run."""

import importlib
from pathlib import Path

from lightning_bge.cli.arguments import PlainParser, check_run
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.journal import shared_storage_of
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.url import parse_storage
from lightning_bge.runtime.port import check_port

DESCRIPTION = """Show the study of a run in a browser with Optuna Dashboard, also while it goes on. A study in a
database has others beside it: NAME-workers, a trial for each process, and NAME-locks. Whoever reaches the address can
change notes and delete studies: it is this machine alone unless --host says otherwise."""


def run(args: list[str]) -> None:
    """Serve until the process is stopped."""
    parser = PlainParser(prog="lightning-bge dashboard", description=DESCRIPTION)
    parser.add_argument("run", type=Path, nargs="?", help="The run's folder; not needed with --storage.")
    parser.add_argument("--storage", metavar="URL", help="Show all studies of this storage.")
    parser.add_argument("--host", default="localhost", help="Address to listen at (default: localhost).")
    parser.add_argument("--port", type=int, default=8080, help="Port to listen at (default: 8080).")
    chosen = parser.parse_args(args)
    if (chosen.run is None) == (chosen.storage is None):
        raise ConfigError("expected RUN or --storage, and not both. Name the run's folder, or a storage")
    if not 1 <= chosen.port <= 65535:
        raise ConfigError(f"--port: expected 1 to 65535, got {chosen.port}")
    url = _storage_of(chosen.run, chosen.storage)
    try:
        dashboard = importlib.import_module("optuna_dashboard")
    except ImportError as error:
        raise ConfigError(
            f"dashboard needs the package optuna-dashboard ({error}). Run: pip install 'lightning-bge[dashboard]'"
        ) from None
    folder = Path(".") if chosen.run is None else chosen.run.expanduser()
    storage = open_study_storage(folder, url, "", option="--storage" if chosen.run is None else "hpo.storage").storage
    check_port(chosen.host, chosen.port)
    print(f"Optuna Dashboard at http://{chosen.host}:{chosen.port}; Ctrl-C stops it", flush=True)
    dashboard.run_server(storage, host=chosen.host, port=chosen.port)


def _storage_of(run: Path | None, url: str | None) -> str | None:
    """The URL of the storage; None: the journal of the run."""
    if run is None:
        assert url is not None
        return parse_storage(url, "--storage").text
    check_run(run)
    folder = run.expanduser()
    if (folder / JOURNAL).is_file():
        return None
    found = shared_storage_of(folder)
    if found is None:
        raise ConfigError(f"RUN: expected the folder of a run of `lightning-bge hpo`, got {run}")
    return found[0]
