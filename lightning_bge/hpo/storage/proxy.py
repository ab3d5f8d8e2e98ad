"""Optuna's gRPC proxy in front of a database."""

import socket
import warnings
from concurrent.futures import ThreadPoolExecutor

from optuna.exceptions import ExperimentalWarning
from optuna.storages import run_grpc_proxy_server

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.storage.database import check_grpc, open_shared_storage
from lightning_bge.hpo.storage.url import StorageURL


def serve_proxy(url: StorageURL, host: str, port: int, pool: ThreadPoolExecutor, threads: int, patience: float) -> None:
    """Serve a database until the process ends.

    Args:
        url: of the database.
        host: address to listen at.
        port: port to listen at.
        pool: serves the calls.
        threads: of the pool.
        patience: seconds for which a call waits for a database that is away.

    Raises:
        ConfigError: a package is missing, or the port is taken.
        StudyError: the database can't be opened.
    """
    check_grpc(f"grpc://{host}:{port}")
    _check_free(host, port)
    storage = open_shared_storage(url, patience=patience, pool=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            print(f"serving {url.shown} at {host}:{port}; Ctrl-C stops it", flush=True)
            run_grpc_proxy_server(storage, host=host, port=port, thread_pool=pool)
        except RuntimeError as error:  # grpc's "Failed to bind to address"
            raise ConfigError(f"--port: {host}:{port} can't be listened at: {error}. Name another one") from error


def _check_free(host: str, port: int) -> None:
    """Raise `ConfigError` where something listens at a port.

    grpc shares a port with another server that allows it, as another proxy does: clients would get the studies of
    either database by chance.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--port: {host}:{port} can't be listened at: {reason}. Name another one") from error
