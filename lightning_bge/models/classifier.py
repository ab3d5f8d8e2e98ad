"""`BGEClassifier`: the LightningModule that fine-tunes an encoder on single texts or pairs of texts."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError
from lightning_bge.models.distributed import gather, sum_gradients, sum_over_ranks, without_sync
from lightning_bge.models.encoder import Attention, TextClassifier, load_classifier, quiet_transformers
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.memory_saving.lora import LoRAConfig, merged_weights
from lightning_bge.models.metrics import Predictions, compute_metrics
from lightning_bge.models.oom_retry import OOMRetry
from lightning_bge.models.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    materialize_state,
)
from lightning_bge.runtime.micro_batch import batch_source
from lightning_bge.runtime.nested_config import as_config, as_plain
from lightning_bge.types import SCHEMA_FILE, TASKS, Batch, Schema, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

RANK_STRIDE = 15_485_863  # ranks draw different dropout masks
SEED_STRIDE = 1_000_003  # a prime far above any number of steps keeps the steps' seeds of neighbouring runs apart


class BGEClassifier(LightningModule):
    """Fine-tunes an encoder as a text or text-pair classifier, regressor or cross-encoder.

    A Lightning batch is one effective batch: its micro-batches go forward and backward one by one, then the optimizer
    steps once. Loss and gradient are the mean over the effective batch, however it was cut. Random numbers are drawn
    anew from the seed and the step's number at every step, so that a resumed run goes on exactly where it stopped.

    Args:
        name_or_path: name on the hub or folder of any encoder: `BAAI/bge-small-en-v1.5`, `BAAI/bge-reranker-base`...
        task: binary (yes/no), multiclass, multilabel or regression.
        loss: which loss, class weights, label smoothing.
        optimizer: AdamW's settings, clipping, layer-wise decay of the learning rate.
        schedule: the learning rate over the optimizer steps.
        dropout: overrides all of the model's dropout probabilities; null keeps the checkpoint's.
        attention: packed (no padding), padded, or auto: packed where the architecture allows.
        seed: of a new head, and of dropout.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code from the hub may run. Off: such code can do anything on your machine.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping its activations.
        frozen_layers: null: everything trains; 0: all but the embeddings; n: all but the embeddings and the n lowest
            layers.
        lora: low-rank factors that train in place of the weights.

    Attributes:
        load: the function that loads the encoder; `load_encoder_with` sets it.
        oom_retry: repeats a step that ran out of memory with less, and records such failures.
    """

    def __init__(
        self,
        name_or_path: str = "BAAI/bge-small-en-v1.5",
        task: Task = "binary",
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        dropout: float | None = None,
        attention: Attention = "auto",
        seed: int = 42,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        frozen_layers: int | None = None,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        loss = as_config(LossConfig, loss, "loss")
        optimizer = as_config(OptimizerConfig, optimizer, "optimizer")
        schedule = as_config(ScheduleConfig, schedule, "schedule")
        lora = as_config(LoRAConfig, lora, "lora")
        given = locals()
        names = inspect.signature(BGEClassifier).parameters
        self.save_hyperparameters({name: as_plain(given[name]) for name in names}, logger=False)
        if task not in TASKS:
            raise ConfigError(f"model.task: expected one of {', '.join(TASKS)}, got {task}")
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"model.dropout: expected 0 to below 1, or null, got {dropout}")
        if frozen_layers is not None and frozen_layers < 0:
            raise ConfigError(f"model.frozen_layers: expected 0 or more, or null, got {frozen_layers}")
        if lora.r is not None and frozen_layers is not None:
            raise ConfigError(
                f"model.lora.r is {lora.r}, which freezes all layers, and model.frozen_layers is {frozen_layers}: "
                "set one of them to null"
            )
        self.automatic_optimization = False
        self.name_or_path = name_or_path
        self.task: Task = task
        self.loss_config = loss
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.seed = seed
        self._load_options: dict[str, Any] = {
            "attention": attention,
            "dropout": dropout,
            "seed": seed,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "gradient_checkpointing": gradient_checkpointing,
            "frozen_layers": frozen_layers,
            "lora": lora,
        }
        self.load: Callable[..., TextClassifier] = load_classifier
        self.schema: Schema | None = None
        self.class_counts: Sequence[float] | None = None
        self.net: TextClassifier | None = None
        self.loss: Loss | None = None
        self.predictions: Predictions | None = None  # of the last validation, test or prediction run
        self.oom_retry = OOMRetry()
        self._trial_steps = False
        self._parts: list[Predictions] = []
        self._losses: list[Tensor] = []

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Load the encoder, once; the labels come from the data module (or from `self.schema`, set by the caller)."""
        self._take_schema()
        assert self.schema is not None
        if self.net is None:
            net = self.load(self.name_or_path, self.schema.num_outputs, **self._load_options)
            if self.schema.max_length > net.max_positions:
                raise ConfigError(
                    f"data.max_length is {self.schema.max_length}, but {self.name_or_path} has positions for "
                    f"{net.max_positions} tokens: set data.max_length to that or less"
                )
            self.net = net
        if self.loss is None:
            self.loss = Loss(self.loss_config, self.task, self.schema.num_outputs, self.class_counts)

    def load_encoder_with(self, load: Callable[..., TextClassifier]) -> None:
        """Load the encoder with another function than `load_classifier`, which has the same arguments.

        A study passes `EncoderCache.load`, which reads an encoder once for all trials.
        """
        self.load = load

    def release_encoder(self) -> None:
        """Hold the encoder no longer, so that its cache can hand it out to the next trial on the same device."""
        self.net = None

    def _take_schema(self) -> None:
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        schema = getattr(datamodule, "schema", None)
        if schema is not None:
            self.schema = replace(schema, threshold=self.schema.threshold) if self.schema is not None else schema
            self.class_counts = getattr(datamodule, "class_counts", None)
        if self.schema is None:
            raise ConfigError(
                "BGEClassifier does not know its labels: train with a data module that has a `schema`, "
                "or set `module.schema = Schema(task, labels, text_columns, max_length)` first"
            )
        if self.schema.task != self.task:
            raise ConfigError(f"model.task is {self.task}, but the data are for a {self.schema.task} task")

    def configure_optimizers(self) -> Any:
        """Fused AdamW and a schedule over all optimizer steps of the run."""
        assert self.net is not None
        optimizer = build_optimizer(self.net, self.optimizer_config)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError("trainer.max_epochs: a schedule needs to know its length; set it, or trainer.max_steps")
        # To answer, the trainer makes the training loader before it restores that loader's state, and would keep it:
        # a run resumed in the middle of an epoch would begin the epoch anew. Without it, it makes another one in time.
        self.trainer.fit_loop._combined_loader = None
        if self.schedule_config.epochs is not None and self.trainer.max_epochs:
            steps = round(steps / self.trainer.max_epochs * self.schedule_config.epochs)
        return [optimizer], [build_schedule(optimizer, self.schedule_config, int(steps))]

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Refuse what would train wrongly; put every module into train mode."""
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"trainer.precision: expected bf16-mixed, 32-true or auto, got {self.trainer.precision}")
        self.train()

    def on_train_start(self) -> None:
        """Make the optimizer's state, so that a step has nothing to allocate, and can't fail half-way."""
        for optimizer in self.trainer.optimizers:
            materialize_state(optimizer)

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
        if self.trainer.loggers and every and self.global_step % every == 0:
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
        """Clip and step; a step that ran out of memory before any weight has changed is repeated."""

        def update() -> None:
            if (norm := self.optimizer_config.max_grad_norm) is not None:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), norm, foreach=True)  # type: ignore[union-attr]
            optimizer.step()

        def has_changed() -> bool:
            # the fused kernel changes no version counter; its own count of steps tells
            return any(float(state.get("step", 0)) > self.global_step for state in optimizer.state.values())

        if self._trial_steps:
            update()
        else:
            self.oom_retry.step(update, has_changed)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss: one log call an epoch, as each one costs more than a small model's step."""
        if self._losses:  # none where a run was resumed at an epoch's very end
            self.log("train_loss", torch.stack(self._losses).mean(), prog_bar=True, sync_dist=self._ranks > 1)
            self._losses.clear()

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch's logits on the device; nothing is computed from them before the end."""
        self._keep(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`."""
        self._keep(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The batch's `rows` [N] and `logits` [N, outputs]; `self.predictions` holds all in their order at the end.

        A rank whose share of the batch is empty gives an empty dictionary.
        """
        parts = self._keep(batch, batch_idx)
        if not parts:
            return {}
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "logits")}

    def _keep(self, batch: Batch, batch_idx: int) -> list[Predictions]:
        assert self.net is not None
        if batch_idx == 0:
            self._parts.clear()  # of a run that was cut off
        parts = self._retried(self._predict, batch, training=False)
        self._parts += parts
        return parts

    def _predict(self, batch: Batch) -> list[Predictions]:
        assert self.net is not None
        parts = []
        for micro in batch.micro:
            self.oom_retry.at("validation", micro)
            parts.append(Predictions(micro.rows, self.net(micro).float(), micro.labels, micro.groups))
        return parts

    def on_validation_epoch_end(self) -> None:
        """Log `val_<metric>` for every metric of the task."""
        self._judge("val")

    def on_test_epoch_end(self) -> None:
        """Log `test_<metric>`, per class too."""
        self._judge("test")

    def on_predict_epoch_end(self) -> None:
        """Put the predictions into the order of the file's rows."""
        self._gather()

    def _gather(self) -> Predictions:
        self.predictions = Predictions.collect(self._parts if self._ranks == 1 else gather(self._parts))
        self._parts.clear()
        return self.predictions

    def _judge(self, prefix: str) -> None:
        found = self._gather()
        if found.labels is None or self.trainer.sanity_checking:
            return
        assert self.schema is not None
        assert self.loss is not None
        metrics = compute_metrics(self.schema, found, per_class=prefix == "test")
        loss = self.loss.cpu()
        metrics["loss"] = float(loss(found.logits, found.labels) / loss.normalizer(found.labels))
        self.loss.to(self.device)
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=len(found.rows), sync_dist=self._ranks > 1)  # the same on all ranks

    # ------------------------------------------------------------------ export

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write a folder that transformers and sentence-transformers load as it is.

        The tokenizer's length limit is set to the one trained with, so that they truncate where we did. The folder
        appears whole or not at all; an older one is replaced. LoRA's factors are merged into the weights written, not
        into the model: training can go on.

        Args:
            folder: where to.
            tokenizer: the one the texts were tokenised with; a copy with the length limit is saved.

        Raises:
            ConfigError: the folder holds something else than an exported model, which would be deleted.
        """
        assert self.net is not None
        assert self.schema is not None
        folder = Path(folder)
        if folder.exists() and not (folder / SCHEMA_FILE).is_file():
            raise ConfigError(f"{folder} exists and is no exported model: name another folder, or delete that one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _describe(self.net.model.config, self.schema)
            with quiet_transformers():
                self.net.model.save_pretrained(draft, state_dict=merged_weights(self.net.model))
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.model_max_length = self.schema.max_length
            tokenizer.save_pretrained(draft)
            self.schema.save(draft)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that a step draws from; `torch.manual_seed` formats a stack trace on every call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _describe(config: Any, schema: Schema) -> None:
    """Tell the peers what the outputs mean: names, and which function makes a score of a logit."""
    config.problem_type = {
        "binary": None,  # one logit with a sigmoid: transformers has no name for it
        "regression": "regression",
        "multiclass": "single_label_classification",
        "multilabel": "multi_label_classification",
    }[schema.task]
    if schema.task in ("multiclass", "multilabel"):
        config.id2label = dict(enumerate(schema.labels))
    else:
        config.id2label = {0: schema.labels[1] if schema.labels else "score"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    sigmoid = schema.task in ("binary", "multilabel")
    activation = "torch.nn.modules.activation.Sigmoid" if sigmoid else "torch.nn.modules.linear.Identity"
    config.sentence_transformers = {"activation_fn": activation}
