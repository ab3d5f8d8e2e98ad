"""Opens the storage of a study in a database, or behind Optuna's gRPC proxy."""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage

from lightning_bge.errors import ConfigError, StudyError, first_line
from lightning_bge.hpo.storage.retrying import Retries, RetryingStorage, is_refusal
from lightning_bge.hpo.storage.url import DRIVERS, PASSWORD, PASSWORD_FILE, StorageURL, read_password
from lightning_bge.hpo.storage.workers import BEATS, WORKER_TIMEOUT
from lightning_bge.runtime.compat.optuna import cached_storage

POOL, MORE = 2, 3  # connections that a process keeps, and may open besides: trials and signs of life
CREATION_TRIES = 10  # processes that create the tables at the same moment disturb each other
CONNECT_SECONDS = 10


def open_shared_storage(
    url: StorageURL,
    *,
    patience: float,
    worker_timeout: float = WORKER_TIMEOUT,
    waits: bool = False,
    pool: int = POOL,
) -> RetryingStorage:
    """Open a storage that processes on several machines share.

    Args:
        url: its address.
        patience: seconds that a call waits for a storage that does not answer.
        worker_timeout: seconds without a sign of life after which a worker counts as gone.
        waits: wait for a storage that does not answer yet, as for one that is away later.
        pool: connections to a database that are kept open.

    Raises:
        ConfigError: a package is missing, or the password can't be read.
        StudyError: the storage does not answer, refuses the login, or its tables are those of another version.
    """
    if url.kind == "grpc":
        return _open_proxy(url, patience, waits)
    _check_driver(url)
    interval = max(1, round(worker_timeout / BEATS))
    options = {"heartbeat_interval": interval, "grace_period": max(2, round(worker_timeout))}
    retries = Retries(f"the database {url.shown}", patience if waits else 0.0)
    opened = _when_it_answers(url, lambda: _open_database(url, engine_options(url, pool), options), retries)
    retries.seconds = patience
    found = RetryingStorage(cached_storage(opened), retries)
    weakref.finalize(found, opened.engine.dispose)  # closes the connections
    return found


def check_answers(url: StorageURL) -> None:
    """Raise `UserError` where a storage can't be used now; nothing is written."""
    if url.kind == "grpc":
        _open_proxy(url, 0.0, waits=False)
        return
    _check_driver(url)
    from sqlalchemy import create_engine

    engine = create_engine(url.text, connect_args=_connect_options(url))
    try:
        _when_it_answers(url, lambda: engine.connect().close(), Retries(url.shown, 0.0))
    finally:
        engine.dispose()


def engine_options(url: StorageURL, pool: int = POOL) -> dict[str, Any]:
    """Options of SQLAlchemy's engine: connections that are kept, tested before use, and cut when they hang."""
    return {
        "pool_size": pool,
        "max_overflow": MORE,
        "pool_pre_ping": True,
        "connect_args": _connect_options(url),
    }


def _connect_options(url: StorageURL) -> dict[str, Any]:
    """What the driver gets besides the URL, whose own parameters count."""
    from sqlalchemy import make_url

    password = read_password()
    given = make_url(url.text).normalized_query
    own: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS}
    added: dict[str, Any] = {} if password is None else {"password": password}
    if url.text.startswith("postgresql"):
        own |= {"application_name": "lightning-bge", "keepalives_idle": 30, "keepalives_interval": 10}
        own["tcp_user_timeout"] = 60_000  # milliseconds: a host that has vanished in the middle of a query
        # one time zone for the signs of life of all clients; no client that was stopped in the middle holds up others
        settings = "-c timezone=UTC -c idle_in_transaction_session_timeout=60000"
        added["options"] = " ".join([*given.get("options", ()), settings])
    return {name: value for name, value in own.items() if name not in given} | added


def _check_driver(url: StorageURL) -> None:
    scheme = url.text.partition("://")[0]
    driver = scheme.partition("+")[2]
    if importlib.util.find_spec(driver) is None:
        raise ConfigError(
            f"{url.option}: {url.shown} needs the package {driver}, which is not installed. "
            f"Run: pip install 'lightning-bge[{DRIVERS[scheme]}]'"
        )


def _open_database(url: StorageURL, engine: dict[str, Any], options: dict[str, Any]) -> RDBStorage:
    from sqlalchemy import NullPool
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    # one that keeps no connections creates and checks the tables: where they are wrong, nothing is left open
    unpooled = {"poolclass": NullPool, "connect_args": engine["connect_args"]}
    for number in range(CREATION_TRIES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # of the heartbeat
                RDBStorage(url.text, unpooled)
                return RDBStorage(url.text, engine, True, skip_table_creation=True, **options)
        except (IntegrityError, ProgrammingError):
            if number == CREATION_TRIES - 1:
                raise
            time.sleep(0.1 * (number + 1))
    raise AssertionError


def check_grpc(address: str) -> None:
    """Raise `ConfigError` where a package is missing that a proxy needs."""
    try:
        for name in ("grpc", "google.protobuf"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{address} needs the packages grpcio and protobuf ({error}). Run: pip install 'lightning-bge[grpc]'"
        ) from None


def _open_proxy(url: StorageURL, patience: float, waits: bool) -> RetryingStorage:
    check_grpc(f"{url.option}: {url.text}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=url.host, port=url.port)
    try:
        proxy.wait_server_ready(timeout=patience if waits else CONNECT_SECONDS)
    except ConnectionError:
        raise StudyError(
            f"{url.option}: no gRPC proxy answers at {url.host}:{url.port}. Start it with `lightning-bge proxy "
            f"DATABASE --port {url.port}`, or correct the address"
        ) from None
    found = RetryingStorage(proxy, Retries(f"the storage {url.text}", patience))
    weakref.finalize(found, proxy.close)
    return found


def _when_it_answers(url: StorageURL, call: Callable[[], Any], retries: Retries) -> Any:
    """Make a call that opens a database; its errors as messages for the user."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return retries.call(call)
    except RuntimeError as error:  # Optuna's check of the tables
        newer = "pip install -U optuna" in str(error)
        fix = "install that version of Optuna" if newer else f"run `optuna storage upgrade --storage {url.shown}`"
        raise StudyError(
            f"{url.option}: the tables in {url.shown} are those of another version of Optuna. Either {fix}, or name an "
            "empty database"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(_describe(url, error)) from None


def _describe(url: StorageURL, error: BaseException) -> str:
    cause = error.__cause__ or error
    reason, text = first_line(getattr(cause, "orig", cause)), str(cause)
    if "permission denied" in text:
        return (
            f"{url.option}: {url.shown}: {reason}. Allow the user to create tables there (for PostgreSQL: GRANT "
            "CREATE, USAGE ON SCHEMA public TO the user), or name a database of the user's own"
        )
    if not is_refusal(text):
        fix = "Start the database, or correct host, port and parameters"
        return f"{url.option}: {url.shown} does not answer: {reason}. {fix}"
    if re.search('database ".*" does not exist', text) or "Unknown database" in text:
        return (
            f"{url.option}: {url.shown}: {reason}. Create the database (for PostgreSQL: createdb), or correct the URL"
        )
    return (
        f"{url.option}: {url.shown} refuses the login: {reason}. Set the password in the environment variable "
        f"{PASSWORD}, or {PASSWORD_FILE} to a file that holds it, and check the user's name"
    )
