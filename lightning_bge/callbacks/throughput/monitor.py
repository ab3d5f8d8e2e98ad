"""Sequences and real tokens per second, utilisation, padding and the wait for data, without waiting for the device."""

import time
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.throughput.flops import (
    CountBatch,
    TrainFlops,
    Work,
    count_sequences_and_tokens,
    matmul_dtype,
    work_of,
)
from lightning_bge.callbacks.throughput.peak import matmul_peak
from lightning_bge.runtime.clock import wait_for


class Throughput(Callback):
    """Logs the pace of training once an epoch, from training batches alone.

    - `train_sequences_per_s` and `train_tokens_per_s`, of all ranks together. The clock runs from the start of the
      first batch to the end of the last one, less validation in between; the device is waited for at these two points
      only.
    - `train_utilisation`: FLOPs a second (`TrainFlops`, of real tokens alone) as a share of `matmul_peak`, which is
      measured at the start of `fit` in the type that matrices are multiplied in. Where lengths are not known
      attention's own FLOPs are left out. Of several ranks it is the mean. This and tokens are not logged where a batch
      has no tokens that are known: it is counted by the rows of its first tensor then.
    - `train_padding`, where it is known (`work_of`): the share (0 to 1) of the computed tokens that are padding, 0 for
      packed batches. Of several ranks it is the mean.
    - `train_data_wait`, the share (0 to 1) of that time between the end of a batch and the start of the next one, on
      the host's clock. In it the loader returns the next batch and the batch is moved to the device; what Lightning and
      callbacks do between batches counts too, so that this is the most that data can have cost. A GPU with queued work
      is busy during that time. Left out are the first batch of an epoch and the first one after validation, as the
      clock starts with them, and what a module fetches inside its `training_step(dataloader_iter)`. Of several ranks it
      is the mean.
    - `train_balance`, where batches come with the tokens of each rank's shard, `batch.shard_tokens`: their mean divided
      by their maximum, averaged over the epoch's steps. 1 is perfect; at 0.9 a tenth of the devices' time goes by
      waiting for the rank with the longest shard, if time goes with tokens.

    Args:
        count: sequences and real (non-padding) tokens of a batch: Python ints, or 0-d tensors on the batch's device.

    Attributes:
        peak: FLOP/s of the machine, from the start of `fit` on.
        flops: those of training the module, from the start of `fit` on.
    """

    def __init__(self, count: CountBatch = count_sequences_and_tokens) -> None:
        self.count = count
        self.peak, self.flops = 0.0, TrainFlops(0, 0)
        self._encoder: Any = None
        self._reset()

    def _reset(self) -> None:
        self._work = self._epoch_began = Work()
        self._balances: list[float] = []
        self._since: float | None = None
        self._batch_ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset what an interrupted run has left behind, and measure the machine's peak."""
        self._reset()
        self._encoder = next((part for part in pl_module.modules() if hasattr(part, "computed_tokens")), None)
        self.flops = TrainFlops.of(pl_module)
        self.peak = matmul_peak(pl_module.device, matmul_dtype(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch and the wait for it, and start the clock where it stands still."""
        waited = 0.0 if self._batch_ended is None else time.perf_counter() - self._batch_ended
        self._work += replace(work_of(batch, self._encoder, self.count), waited=waited)
        shards = getattr(batch, "shard_tokens", ())
        if len(shards) > 1:
            self._balances.append(sum(shards) / len(shards) / max(shards))
        if self._since is None:
            wait_for(pl_module.device)
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
        epoch = self._work - self._epoch_began
        if epoch.seconds:
            ranks = trainer.world_size  # the mean over the ranks, which is what is logged, times their number is a sum
            figures: dict[str, Any] = {
                "train_sequences_per_s": epoch.sequences * ranks / epoch.seconds,
                "train_data_wait": epoch.waited / epoch.seconds,
            }
            if epoch.has_tokens:
                figures["train_tokens_per_s"] = epoch.tokens * ranks / epoch.seconds
                figures["train_utilisation"] = self.flops.total(epoch) / epoch.seconds / self.peak
            if epoch.padding is not None:
                figures["train_padding"] = epoch.padding
            if self._balances:
                figures["train_balance"] = sum(self._balances) / len(self._balances)
            pl_module.log_dict(figures, sync_dist=ranks > 1)
        self._epoch_began, self._balances = self._work, []

    def so_far(self) -> Work:
        """The work since training began, of this rank, by the host's clock; no device is waited for."""
        if self._since is None:
            return self._work
        return self._work + Work(seconds=time.perf_counter() - self._since)

    def _stop(self, module: LightningModule) -> None:
        self._batch_ended = None
        if self._since is not None:
            wait_for(module.device)
            self._work += Work(seconds=time.perf_counter() - self._since)
            self._since = None
