"""Optuna's gRPC proxy in front of a database."""

import warnings
from concurrent.futures import ThreadPoolExecutor

from optuna.exceptions import ExperimentalWarning
from optuna.storages import run_grpc_proxy_server

from lightning_bge.hpo.storage.database import check_grpc, open_shared_storage
from lightning_bge.hpo.storage.url import StorageURL
from lightning_bge.runtime.port import check_port, port_error


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
    check_port(host, port)
    storage = open_shared_storage(url, patience=patience, pool=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            print(f"serving {url.shown} at {host}:{port}; Ctrl-C stops it", flush=True)
            run_grpc_proxy_server(storage, host=host, port=port, thread_pool=pool)
        except RuntimeError as error:  # grpc's "Failed to bind to address"
            raise port_error(host, port, str(error)) from error
