"""Workers as actors of a Ray cluster."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.config import RayConfig
from lightning_bge.hpo.launchers.launcher import ERROR, log_of, worker_arguments
from lightning_bge.hpo.launchers.local import WorkerProcess
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.hpo.storage.url import PASSWORD, PASSWORD_FILE, read_password
from lightning_bge.hpo.storage.workers import WORKERS
from lightning_bge.runtime.run_folder import create_run_dir, write_text

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 20.0  # for `ray status`, which takes one; Ray itself waits for minutes where something else listens
OF_LIBPQ = ("PGPASSWORD",)  # what libpq reads besides
RECORDS = ("config.yaml", "run.json")  # files of the run folder that a worker on another machine needs


@dataclass(frozen=True)
class Order:
    """What an actor is to run.

    Attributes:
        run_dir: of the study, absolute.
        number: of the worker.
        share: how many workers the device has.
        until: begin no trial after this time, of `time.time()`; None: there is no limit.
        records: content of the run folder's `RECORDS`, by name.
        has_storage: the study is kept in a storage that machines share, and not in the run folder.
        environment: variables of the worker's process, with the storage's password.
    """

    run_dir: Path
    number: int
    share: int
    until: float | None
    records: dict[str, str]
    has_storage: bool
    environment: dict[str, str]

    def __repr__(self) -> str:
        return f"Order(run_dir={str(self.run_dir)!r}, number={self.number})"  # no password


@dataclass(frozen=True)
class Ended:
    """How a worker has ended: its exit status, and the last lines that it printed."""

    status: int
    output: str


def load_ray() -> Any:
    """The package `ray`, which is imported where it is used.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--launcher ray needs a package: run `pip install 'lightning-bge[ray]'`") from error
    return ray


class WorkerActor:
    """Runs a worker's process on the node where Ray has placed it.

    Its methods run in threads of their own. The process ends with the actor, which is its parent.
    """

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None
        self._stops = False

    def node(self) -> str:
        """Ray's id of the node."""
        return str(load_ray().get_runtime_context().get_node_id())

    def run(self, order: Order) -> Ended:
        """Run a worker to its end. Ray calls it anew where the actor was started again."""
        if self._stops:
            return Ended(0, "")
        if not order.has_storage and not (order.run_dir / JOURNAL).is_file():
            return Ended(
                2,
                f"{ERROR}{order.run_dir} is not on the node {socket.gethostname()}. Set run_dir to a folder that all "
                "nodes of the Ray cluster mount, or hpo.storage to a database and hpo.files to what all nodes reach",
            )
        create_run_dir(order.run_dir)
        for name, text in order.records.items():
            path = order.run_dir / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
        log = log_of(order.run_dir, order.number)
        arguments = worker_arguments(order.run_dir, order.share, os.getpid(), order.until, time.time())
        process = self._process = WorkerProcess(arguments, log, order.environment)
        if self._stops:
            process.terminate()
        status = process.wait()
        return Ended(status, "" if status == 0 else process.output())

    def stop(self) -> None:
        """Ask the worker to save what it trains and to end."""
        self._stops = True
        if self._process is not None:
            self._process.terminate()


class RayWorker:
    """A worker on a Ray cluster.

    Args:
        actor: a handle of `WorkerActor`.
        order: what it is to run.

    Attributes:
        placed: a reference to the id of its node, which is there once Ray has placed it.
    """

    def __init__(self, actor: Any, order: Order) -> None:
        self.order, self._ray = order, load_ray()
        self._actor, self._ended = actor, Ended(0, "")
        self._running = actor.run.remote(order)
        self.placed = self._answer = actor.node.remote()
        self.where = f"{log_of(order.run_dir, order.number)} on its node"

    def poll(self) -> int | None:
        """The exit status, negative after a signal or where the actor is lost; None: it runs or waits for a node."""
        if not self._ray.wait([self._running], timeout=0)[0]:
            return None
        try:
            self._ended = self._ray.get(self._running)
        except self._ray.exceptions.RayError as error:  # the actor is gone, and Ray has started it as often as it may
            self._ended = Ended(-1, str(error).strip())
        return self._ended.status

    def waits(self) -> bool:
        """Whether the actor has not answered since the call before: Ray has not placed it, or not placed it again."""
        if not self._ray.wait([self._answer], timeout=0)[0]:
            return True
        self._answer = self._actor.node.remote()
        return False

    def output(self) -> str:
        """The last lines that it printed."""
        return self._ended.output

    def terminate(self) -> None:
        """Ask it to save what it trains and to end; one that was never placed is given up."""
        if self._ray.wait([self.placed], timeout=0)[0]:
            self._actor.stop.remote()
        else:
            self.kill()

    def kill(self) -> None:
        """End it at once, and free what it holds."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)


class RayLauncher:
    """Starts workers as actors on a Ray cluster that is there.

    Args:
        config: what each worker asks the cluster for.
        hpo: the options of the study.

    Raises:
        ConfigError: no cluster answers at the address, or it is of another version of Ray or Python.
    """

    def __init__(self, config: RayConfig, hpo: StudyConfig) -> None:
        if config.label_selector and hpo.workers is None:
            raise ConfigError(
                "hpo.workers: expected a number with ray.label_selector, got null. Set how many workers the nodes with "
                "these labels are to run"
            )
        self._config, self._has_storage, self._ray = config, hpo.storage is not None, load_ray()
        self._connect()
        self._demand = config.demand(self._ray.cluster_resources())
        self._room = sum(_fitting(node["Resources"], self._demand) for node in self._nodes())
        self.n_workers = hpo.workers or max(1, self._room)
        password = read_password() if self._has_storage else None
        self._environment = {} if password is None else {PASSWORD: password, PASSWORD_FILE: ""}
        self._environment |= {name: os.environ[name] for name in OF_LIBPQ if self._has_storage and name in os.environ}

    def describe(self, run_dir: Path) -> str:
        """Where the workers run, and where they print, in a line."""
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self._demand.items()) or "nothing"
        line = f"{self.n_workers} workers on a Ray cluster of {len(self._nodes())} nodes, each with {asked}; "
        line += f"what each prints is in {run_dir / WORKERS} on its node"
        if self._room < self.n_workers:
            line += f". The nodes have room for {self._room} of them: the others wait for more nodes"
        return line

    def start(self, run_dir: Path, number: int, until: float | None) -> RayWorker:
        """Start a worker; see `Launcher.start`."""
        share = max(1, math.floor(1 / self._demand["GPU"])) if "GPU" in self._demand else self.n_workers
        folder = run_dir.resolve()
        records = {name: (folder / name).read_text(encoding="utf-8") for name in RECORDS}
        order = Order(folder, number, share, until, records, self._has_storage, self._environment)
        more = {name: amount for name, amount in self._demand.items() if name not in ("CPU", "GPU")}
        kind = self._ray.remote(WorkerActor).options(
            num_cpus=self._demand.get("CPU", 0),
            num_gpus=self._demand.get("GPU", 0),
            resources=more,
            label_selector=self._config.label_selector or None,
            max_restarts=self._config.max_restarts,
            max_task_retries=self._config.max_restarts,
            max_concurrency=3,  # `run` takes one thread as long as the worker lives
        )
        return RayWorker(kind.remote(), order)

    def _connect(self) -> None:
        ray, address = self._ray, self._config.address
        if ray.is_initialized():
            return
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if host and port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                if not address.startswith("ray://"):
                    _check_answers(address)
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"ray.address: no Ray cluster answers at {address} ({reason}). Start one with `ray start --head`, or "
                "set ray.address to the host:port of one that runs (port 6379 unless it was started with another), or "
                "to ray://host:port of its Ray Client server (port 10001)"
            ) from error

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]


def _check_answers(address: str) -> None:
    """Raise `TimeoutError` where something listens that is no Ray cluster."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"what listens there has not answered Ray for {ANSWER_SECONDS:.0f} s") from None


def _fitting(node: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """How many workers fit on a node, where nothing else runs on it."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in demand.items()), default=1)
