"""A function in several processes at once, which know of each other as Lightning's launcher would have it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

# They are forked from a process that has imported this once.
PRELOADED = ["lightning_bge.data", "lightning_bge.models", "tests.helpers.small_models"]


def run_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: float = 100) -> list[Any]:
    """What the function of a test's module returns in each process; an error in one of them ends all.

    Warnings are errors there too. A function that uses no trainer calls `torch.distributed.init_process_group("gloo")`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(rank, ranks, port, sender, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], until: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = multiprocessing.connection.wait(waiting, until - time.monotonic())
        assert ready, f"ranks {sorted(found)} alone have answered in time"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            found[rank], error = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            assert error is None, f"rank {rank}: {error}"
    return [found[rank] for rank in range(len(pipes))]


def _enter(rank: int, ranks: int, port: int, sender: Connection, function: Callable[..., Any], args: Any) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning 2.6.6 under jsonargparse 4.53
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))  # `send` would share the tensors of a process that ends
