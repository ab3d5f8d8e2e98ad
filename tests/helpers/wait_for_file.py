"""A callback by which tests hold a training in another process until they have seen it."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class WaitForFile(Callback):
    """Training starts when a file exists, after two minutes at the latest. While it waits, `path.waiting` is there.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        until = time.monotonic() + 120
        self.path.with_suffix(".waiting").touch()
        while not self.path.exists() and time.monotonic() < until:
            time.sleep(0.05)
