"""Sequences and real tokens per second and the wait for data, without waiting for the device in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


def count_sequences_and_tokens(batch: Any) -> tuple[int, int | Tensor]:
    """Sequences and real tokens of a batch: ours, or a mapping with an `attention_mask` [N, T].

    The mask's sum stays a tensor: to read it would be to wait for the device.

    Raises:
        TypeError: the batch is neither; give `Throughput` a `count` of your own.
    """
    if hasattr(batch, "tokens") and hasattr(batch, "size"):
        return batch.size, batch.tokens
    try:
        mask = batch["attention_mask"]
    except (TypeError, KeyError, IndexError):
        raise TypeError(
            f"Throughput counts batches with an attention_mask, got {type(batch).__name__}: "
            "pass count=lambda batch: (sequences, tokens)"
        ) from None
    return len(mask), mask.sum()


class Throughput(Callback):
    """Logs the pace of training once an epoch, from training batches alone.

    - `train_sequences_per_s` and `train_tokens_per_s`, of all ranks together. The clock runs from the start of the
      first batch to the end of the last one, less validation in between; the device is waited for at these two points
      only.
    - `train_data_wait`, the share (0 to 1) of that time that lies between the end of a batch and the start of the next
      one, on the host's clock. Here the loader is asked for the next batch and the batch is moved to the device; what
      Lightning and callbacks do between batches counts too, so that this is the most that data can have cost. A GPU
      that still has work queued up does not stand still meanwhile. Left out are the first batch of an epoch and of a
      stretch after validation, as the clock starts with them, and whatever a module fetches inside its
      `training_step(dataloader_iter)`. Of several ranks it is the mean.
    - `train_balance`, where batches come with the tokens of each rank's share, `batch.shares`: their mean divided by
      their maximum, averaged over the epoch's steps. 1 is perfect; at 0.9 a tenth of the devices' time goes by waiting
      for the rank with the longest share, if time goes with tokens.

    Args:
        count: sequences and real (non-padding) tokens of a batch: Python ints, or 0-d tensors on the batch's device.
    """

    def __init__(self, count: Callable[[Any], tuple[int, int | Tensor]] = count_sequences_and_tokens) -> None:
        self.count = count
        self._reset()

    def _reset(self) -> None:
        self.sequences = 0
        self.tokens: int | Tensor = 0
        self.seconds = self.waited = 0.0
        self.balances: list[float] = []
        self._since: float | None = None
        self._batch_ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a run that was cut off has left behind."""
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch and the wait for it, and start the clock where it stands still."""
        if self._batch_ended is not None:
            self.waited += time.perf_counter() - self._batch_ended
        sequences, tokens = self.count(batch)
        self.sequences += sequences
        self.tokens = self.tokens + tokens
        shares = getattr(batch, "shares", ())
        if len(shares) > 1:
            self.balances.append(sum(shares) / len(shares) / max(shares))
        if self._since is None:
            _wait(pl_module)
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, from which the next batch is waited for."""
        self._batch_ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        self._stop(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's figures; none where a run was resumed at an epoch's very end."""
        self._stop(pl_module)
        if self.seconds:
            ranks = trainer.world_size  # the mean over the ranks, which is what is logged, times their number is a sum
            figures = {
                "train_sequences_per_s": self.sequences * ranks / self.seconds,
                "train_tokens_per_s": self.tokens * ranks / self.seconds,
                "train_data_wait": self.waited / self.seconds,
            }
            if self.balances:
                figures["train_balance"] = sum(self.balances) / len(self.balances)
            pl_module.log_dict(figures, sync_dist=ranks > 1)
        self._reset()

    def _stop(self, module: LightningModule) -> None:
        self._batch_ended = None
        if self._since is not None:
            _wait(module)
            self.seconds += time.perf_counter() - self._since
            self._since = None


def _wait(module: LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
