"""`lightning-bge proxy DATABASE`: Optuna's gRPC proxy in front of a database, for hundreds of workers."""

import math
from concurrent.futures import ThreadPoolExecutor

from lightning_bge.cli.arguments import PlainParser
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.storage.proxy import serve_proxy
from lightning_bge.hpo.storage.url import parse_storage

DESCRIPTION = """Serve the studies of a database to many workers through Optuna's gRPC proxy, so that the database has a
few connections in place of several for each worker. Workers name it as --hpo.storage grpc://HOST:PORT. The proxy asks
for no password and its connections are not encrypted: let it listen in a network that you trust."""


def run(args: list[str]) -> None:
    """Serve until the process is stopped."""
    parser = PlainParser(prog="lightning-bge proxy", description=DESCRIPTION)
    parser.add_argument("database", help="Its URL, as postgresql+psycopg://user@host/database, without a password.")
    parser.add_argument("--host", default="localhost", help="Address to listen at; 0.0.0.0: all of this machine.")
    parser.add_argument("--port", type=int, default=13000, help="Port to listen at (default: 13000, Optuna's).")
    parser.add_argument("--threads", type=int, default=32, help="Calls that are served at once (default: 32).")
    parser.add_argument(
        "--storage_timeout", type=float, default=600.0, metavar="S", help="Seconds for which the database may be away."
    )
    chosen = parser.parse_args(args)
    url = parse_storage(chosen.database, "DATABASE")
    if url.kind != "database":
        raise ConfigError(f"DATABASE: expected the URL of a database, got {url.text}")
    for name, most in (("threads", 10_000), ("port", 65535)):
        if not 1 <= getattr(chosen, name) <= most:
            raise ConfigError(f"--{name}: expected 1 to {most}, got {getattr(chosen, name)}")
    if not 0 <= chosen.storage_timeout < math.inf:
        raise ConfigError(f"--storage_timeout: expected 0 seconds or more, got {chosen.storage_timeout}")
    quiet_optuna()
    with ThreadPoolExecutor(chosen.threads) as pool:
        serve_proxy(url, chosen.host, chosen.port, pool, chosen.threads, chosen.storage_timeout)
