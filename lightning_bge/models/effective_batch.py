"""A LightningModule whose batch is one effective batch, cut into micro-batches that fit into memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_bge.models.distributed import gather, sum_gradients, sum_over_ranks, without_sync
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.loss_scaling import LossScaling, check_precision, loss_scaler, steps_made
from lightning_bge.models.losses import Loss
from lightning_bge.models.memory_saving.oom_retry import OOMRetry
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.names import HAS_THRESHOLD, Metric
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.metrics.threshold import tuned_metrics
from lightning_bge.models.optimizer import change_detector, materialize_state
from lightning_bge.models.trainer_options import OptionsInEffect
from lightning_bge.runtime.callback_kinds import check_usable
from lightning_bge.runtime.compat.lightning import average_parameters_alone
from lightning_bge.runtime.micro_batch import batch_source
from lightning_bge.types import Batch, Schema

T = TypeVar("T")

RANK_STRIDE = 15_485_863  # ranks draw different dropout masks
SEED_STRIDE = 1_000_003  # a prime far above any number of steps keeps the steps' seeds of neighbouring runs apart


class EffectiveBatchModule(LightningModule):
    """Trains and evaluates an encoder on effective batches.

    A Lightning batch is one effective batch: its micro-batches go forward and backward one by one, then the optimizer
    steps once. Loss and gradient are the mean over the effective batch, however it was cut. Random numbers are drawn
    anew from the seed and the step's number at every step, so that a resumed run continues exactly where it stopped.

    In fp16 (`16-mixed`) a step whose gradients are not finite is skipped, on all ranks: weights and the optimizer's
    state stay as they are, and the loss scale is halved. `global_step` and the schedule count it, as Lightning does
    (transformers' Trainer counts it too, but not in its schedule): only the device knows of it, and is not waited for.

    A subclass sets `schema`, `net` and `loss` in `configure_model`, and makes the optimizer.

    Args:
        seed: of dropout.
        max_grad_norm: gradients are clipped to this norm; None switches clipping off. A trainer's `gradient_clip_val`
            takes its place.

    Attributes:
        schema: what the model reads and predicts.
        net: the encoder with its head; None until `configure_model`, which the trainer calls.
        loss: the loss; None until then.
        predictions: of the last validation, test or prediction run of a trainer.
        monitored: a metric that is computed besides the usual ones, by its name or class; None: there is none.
        oom_retry: repeats a step that ran out of memory with less, and records such failures.
    """

    def __init__(self, *, seed: int, max_grad_norm: float | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.max_grad_norm = seed, max_grad_norm
        self.schema: Schema | None = None
        self.net: TextClassifier | None = None
        self.loss: Loss | None = None
        self.predictions: Predictions | None = None
        self.monitored: Metric | None = None
        self.oom_retry = OOMRetry()
        self._trial_steps = False
        self._scaling: LossScaling | None = None
        self._threshold_rows: Predictions | None = None
        self._parts: list[Predictions] = []
        self._losses: list[Tensor] = []

    # ------------------------------------------------------------------ training

    def configure_callbacks(self) -> list[Callback]:
        """Refuse callbacks that can't work here; take over `gradient_clip_val` and `accumulate_grad_batches`.

        Lightning calls this before it checks what manual optimization does not support.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_usable(callbacks)
        for callback in callbacks:
            if isinstance(callback, WeightAveraging):
                average_parameters_alone(callback)
        return [OptionsInEffect(self.trainer, self)]

    def on_fit_start(self) -> None:
        """Refuse what would train wrongly; put every module into train mode."""
        check_precision(self.trainer)
        self.train()

    def on_train_start(self) -> None:
        """Make the optimizer's state, so that a step has nothing to allocate, and can't fail half-way."""
        for optimizer in self.trainer.optimizers:
            materialize_state(optimizer)
        scaler = loss_scaler(self.trainer)
        self._scaling = None
        if scaler is not None:
            self._scaling = LossScaling(scaler, self.trainer.optimizers[0], self.device, self.global_step)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, [N, outputs], in the order of the batch's micro-batches."""
        assert self.net is not None
        return torch.cat([self.net(micro) for micro in batch.micro])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over one effective batch."""
        assert self.net is not None
        assert self.loss is not None
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        normalizer = self.loss.normalizer(batch.labels) if batch.micro else 0.0  # type: ignore[arg-type]
        if self._ranks > 1:
            normalizer = sum_over_ranks(normalizer, self.device)
        with without_sync(self.trainer.strategy.model):
            total = self._retried(partial(self._add_gradients, normalizer), batch, training=True)
        if self._ranks > 1:
            sum_gradients(self.net.parameters(), idle=0 in batch.shard_tokens)
            total = sum_over_ranks(total, self.device)
        self._update(optimizer)
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]
        self._losses.append(total)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0 and not self._trial_steps:
            if self._scaling is not None:
                self._scaling.check()
            if self.trainer.loggers:
                self.log("train_loss_step", total, batch_size=batch.size)

    @property
    def _ranks(self) -> int:
        return 1 if self._trial_steps else self.trainer.world_size

    @contextmanager
    def trial_steps(self) -> Iterator[None]:
        """A context for trial steps: ranks do not wait for each other, and out-of-memory errors are raised at once.

        `MicroBatchFinder` uses it, as each rank searches on its own.
        """
        self._trial_steps = True
        try:
            yield
        finally:
            self._trial_steps = False

    def _retried(self, compute: Callable[[Batch], T], batch: Batch, training: bool) -> T:
        """`compute(batch)`, repeated with less memory where it runs out of it."""
        assert self.net is not None
        if self._trial_steps:
            try:
                return compute(batch)
            finally:
                self.oom_retry.at("data")  # no reference to the micro-batch that failed
        source = batch_source(self.trainer, self)
        return self.oom_retry.run(compute, batch, self.net, source=source, training=training)

    def _add_gradients(self, normalizer: Tensor | float, batch: Batch) -> Tensor:
        """Forward and backward of each micro-batch -> this rank's part of the loss, 0-d."""
        assert self.net is not None
        assert self.loss is not None
        _seed(self.device, self.seed * SEED_STRIDE + self.global_step + self.global_rank * RANK_STRIDE)
        total = torch.zeros((), device=self.device)
        for micro in batch.micro:
            self.oom_retry.at("forward", micro)
            loss = self.loss(self.net(micro), micro.labels) / normalizer
            self.oom_retry.at("backward", micro)
            self.manual_backward(loss)
            total += loss.detach()
        return total

    def _update(self, optimizer: Any) -> None:
        """Unscale, clip and step; a step that ran out of memory before any weight has changed is repeated."""
        scaler, raw, unscaled = loss_scaler(self.trainer), optimizer.optimizer, False
        if scaler is not None and self._trial_steps:
            materialize_state(raw)  # a step that is skipped would make none

        def update() -> None:
            nonlocal unscaled
            if scaler is not None and not unscaled:
                scaler.unscale_(raw)
                unscaled = True  # also where the rest is repeated
            if (norm := self.max_grad_norm) is not None:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), norm, foreach=True)  # type: ignore[union-attr]
            optimizer.step()

        if self._trial_steps:
            update()
            return
        made = self.global_step if scaler is None else steps_made(raw)
        self.oom_retry.step(update, change_detector(optimizer, made))

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss: one log call an epoch, as each one costs more than a small model's step."""
        if self._losses:  # none where a run was resumed at an epoch's very end
            self.log("train_loss", torch.stack(self._losses).mean(), prog_bar=True, sync_dist=self._ranks > 1)
            self._losses.clear()
        if self._scaling is not None:
            found = self._scaling.end_epoch(self.trainer.optimizers[0], self.global_step)
            self.log_dict(found, sync_dist=self._ranks > 1)  # the same on all ranks

    # ------------------------------------------------------------------ evaluation

    def tune_threshold_on(self, predictions: Predictions) -> None:
        """Decide validation rows for `val_tuned_<metric>` at the threshold that is best on these rows.

        Args:
            predictions: of rows that this module does not validate on, with labels: those of a study's earlier folds.
        """
        self._threshold_rows = predictions

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch's logits on the device; nothing is computed from them before the end."""
        self._keep(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`."""
        self._keep(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The batch's `rows` [N] and `logits` [N, outputs]; `self.predictions` holds all in their order at the end.

        A rank whose shard of the batch is empty gives an empty dictionary.
        """
        parts = self._keep(batch, batch_idx)
        if not parts:
            return {}
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "logits")}

    def _keep(self, batch: Batch, batch_idx: int) -> list[Predictions]:
        assert self.net is not None
        if batch_idx == 0:
            self._parts.clear()  # of a run that was interrupted
        parts = self.compute_batch(batch)
        self._parts += parts
        return parts

    def compute_batch(self, batch: Batch) -> list[Predictions]:
        """The logits of a batch's micro-batches, in their order, which may be smaller where memory ran out."""
        return self._retried(self._predict, batch, training=False)

    def _predict(self, batch: Batch) -> list[Predictions]:
        assert self.net is not None
        parts = []
        for micro in batch.micro:
            self.oom_retry.at("validation", micro)
            parts.append(Predictions(micro.rows, self.net(micro).float(), micro.labels, micro.groups))
        return parts

    def on_validation_epoch_end(self) -> None:
        """Log `val_<metric>` for the usual metrics and the monitored one, `val_tuned_<metric>` at tuned thresholds."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log `test_<metric>`, per class too."""
        self._log_metrics("test")

    def on_predict_epoch_end(self) -> None:
        """Put the predictions into the order of the file's rows."""
        self._gather()

    def _gather(self) -> Predictions:
        self.predictions = Predictions.collect(self._parts if self._ranks == 1 else gather(self._parts))
        self._parts.clear()
        return self.predictions

    def _log_metrics(self, prefix: str) -> None:
        found = self._gather()
        if found.labels is None or self.trainer.sanity_checking:
            return
        assert self.schema is not None
        assert self.loss is not None
        metrics = compute_metrics(self.schema, found, per_class=prefix == "test", monitored=self.monitored)
        if prefix == "val" and self.schema.task in HAS_THRESHOLD:
            tuned = tuned_metrics(self.schema, found, self._threshold_rows, self.monitored)
            metrics |= {f"tuned_{name}": value for name, value in tuned.items()}
        loss = self.loss.cpu()
        metrics["loss"] = float(loss(found.logits, found.labels) / loss.normalizer(found.labels))
        self.loss.to(self.device)
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=len(found.rows), sync_dist=self._ranks > 1)  # the same on all ranks


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that a step draws from; `torch.manual_seed` formats a stack trace on every call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
