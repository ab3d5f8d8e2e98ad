"""`BGEClassifier`: the LightningModule that fine-tunes an encoder on single texts or pairs of texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError
from lightning_bge.models.distributed import gather, sum_gradients, sum_over_ranks, without_sync
from lightning_bge.models.encoder import Attention, TextClassifier, build_classifier, load_classifier
from lightning_bge.models.export import export_classifier
from lightning_bge.models.inference import Text, TextPredictions, predict_texts
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.metrics import Predictions, compute_metrics
from lightning_bge.models.oom_retry import OOMRetry
from lightning_bge.models.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    materialize_state,
)
from lightning_bge.runtime.compat.lightning import estimated_steps
from lightning_bge.runtime.micro_batch import batch_source
from lightning_bge.runtime.nested_config import as_config, as_plain
from lightning_bge.types import TASKS, Batch, Schema, Task

T = TypeVar("T")

RANK_STRIDE = 15_485_863  # ranks draw different dropout masks
CHECKPOINT_KEY = "lightning_bge"  # of what `load_from_checkpoint` needs besides weights and arguments
ENCODER_OPTIONS = (
    *("attention", "dropout", "seed", "revision", "trust_remote_code"),
    *("gradient_checkpointing", "frozen_layers", "lora"),
)  # arguments that the function that loads the encoder gets
SEED_STRIDE = 1_000_003  # a prime far above any number of steps keeps the steps' seeds of neighbouring runs apart


class BGEClassifier(LightningModule):
    """Fine-tunes an encoder as a text or text-pair classifier, regressor or cross-encoder.

    A Lightning batch is one effective batch: its micro-batches go forward and backward one by one, then the optimizer
    steps once. Loss and gradient are the mean over the effective batch, however it was cut. Random numbers are drawn
    anew from the seed and the step's number at every step, so that a resumed run continues exactly where it stopped.

    A checkpoint of a run holds the arguments, the label schema and the encoder's configuration:
    `BGEClassifier.load_from_checkpoint(path)` returns a model that predicts, without a data module.

    Args:
        name_or_path: name on the hub or folder of any encoder: `BAAI/bge-small-en-v1.5`, `BAAI/bge-reranker-base`...
        task: binary (yes/no), multiclass, multilabel or regression.
        loss: which loss, class weights, label smoothing. This, the next two and `lora` may be dicts of their fields,
            such as `optimizer={"lr": 1e-4}`.
        optimizer: options of AdamW, clipping, layer-wise decay of the learning rate.
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
        hparams: the arguments as plain data; `BGEClassifier(**hparams)` is an equal module.
        load: the function that loads the encoder; `load_encoder_with` sets it.
        schema: what the model reads and predicts: from the data module, a checkpoint or an exported model, or set by
            `set_schema`; None until then.
        net: the encoder with its head; None until `configure_model`, which the trainer calls.
        predictions: of the last validation, test or prediction run of a trainer.
        oom_retry: repeats a step that ran out of memory with less, and records such failures.

    Raises:
        ConfigError: an argument has a wrong value, or excludes another.
    """

    # More than 10 arguments: each is an option that users type on the command line, and the frequent ones stay flat.
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
        arguments = {name: given[name] for name in inspect.signature(BGEClassifier).parameters}
        _check_arguments(**arguments)
        # no logger: the data module's `revision` and `task` have the same names, which Lightning takes for a conflict
        self.save_hyperparameters(as_plain(arguments), logger=False)
        self.automatic_optimization = False
        self.name_or_path = name_or_path
        self.task: Task = task
        self.loss_config, self.optimizer_config, self.schedule_config = loss, optimizer, schedule
        self.seed = seed
        self._encoder_options = {name: arguments[name] for name in ENCODER_OPTIONS}
        self.load: Callable[..., TextClassifier] = load_classifier
        self.schema: Schema | None = None
        self.class_counts: Sequence[float] | None = None
        self.net: TextClassifier | None = None
        self.loss: Loss | None = None
        self.predictions: Predictions | None = None
        self.oom_retry = OOMRetry()
        self._trial_steps = False
        self._parts: list[Predictions] = []
        self._losses: list[Tensor] = []

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Load the encoder and build the loss, once.

        Without a trainer and a label schema nothing is built yet: `load_from_checkpoint` calls this first, and then
        builds what the checkpoint describes.
        """
        self._find_schema()
        if self.schema is None:
            return
        if self.net is None:
            net = self.load(self.name_or_path, self.schema.num_outputs, **self._encoder_options)
            if self.schema.max_length > net.max_positions:
                raise ConfigError(
                    f"data.max_length is {self.schema.max_length}, but {self.name_or_path} has positions for "
                    f"{net.max_positions} tokens: set data.max_length to that or less"
                )
            self.net = net
        if self.loss is None:
            self.loss = Loss(self.loss_config, self.task, self.schema.num_outputs, self.class_counts)

    def set_schema(self, schema: Schema) -> None:
        """Set labels, text columns, length limit and threshold of the predictions.

        Without a data module that has a `schema`, call this before training. A threshold is kept when a data module
        brings its schema later.
        """
        self.schema = schema

    def load_encoder_with(self, load: Callable[..., TextClassifier]) -> None:
        """Load the encoder with another function than `load_classifier`, which has the same arguments.

        A study passes `EncoderCache.load`, which reads an encoder once for all trials.
        """
        self.load = load

    def release_encoder(self) -> None:
        """Hold the encoder no longer, so that its cache can hand it out to the next trial on the same device."""
        self.net = None

    def _find_schema(self) -> None:
        """From the trainer's data module, else the one that was set, else the one beside an exported model."""
        try:
            trainer = self.trainer
        except RuntimeError:  # the module is not attached to a trainer
            trainer = None
        datamodule = getattr(trainer, "datamodule", None)
        schema = getattr(datamodule, "schema", None)
        if schema is not None:
            self.schema = replace(schema, threshold=self.schema.threshold) if self.schema is not None else schema
            self.class_counts = getattr(datamodule, "class_counts", None)
        if self.schema is None:
            self.schema = Schema.load(Path(self.name_or_path).expanduser())
        if self.schema is None:
            if trainer is None:
                return
            raise ConfigError(
                "BGEClassifier does not know its labels: train with a data module that has a `schema`, "
                "or call `module.set_schema(Schema(task, labels, text_columns, max_length))` first"
            )
        if self.schema.task != self.task:
            raise ConfigError(f"task is {self.task}, but the data are for a {self.schema.task} task: make them equal")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the label schema and the encoder's configuration, as plain data."""
        assert self.net is not None
        assert self.schema is not None
        remote = self.hparams["trust_remote_code"]  # code from the hub is read from there
        checkpoint[CHECKPOINT_KEY] = {
            "schema": as_plain(asdict(self.schema)),
            "class_counts": None if self.class_counts is None else [float(count) for count in self.class_counts],
            "encoder": None if remote else as_plain(self.net.model.config.to_dict()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build what the checkpoint describes, where nothing is built yet: in `load_from_checkpoint`."""
        saved = checkpoint.get(CHECKPOINT_KEY)
        if self.net is not None or saved is None:
            return
        self.schema, self.class_counts = Schema.from_plain(saved["schema"]), saved["class_counts"]
        if saved["encoder"] is not None:
            names = inspect.signature(build_classifier).parameters
            options = {name: value for name, value in self._encoder_options.items() if name in names}
            self.net = build_classifier(saved["encoder"], **options)
        self.configure_model()

    def configure_optimizers(self) -> Any:
        """Fused AdamW and a schedule over all optimizer steps of the run."""
        assert self.net is not None
        optimizer = build_optimizer(self.net, self.optimizer_config)
        steps = estimated_steps(self.trainer)
        if math.isinf(steps):
            raise ConfigError("trainer.max_epochs: a schedule needs to know its length; set it, or trainer.max_steps")
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

    # ------------------------------------------------------------------ inference and export

    def predict(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None = None, max_tokens: int = 8192
    ) -> TextPredictions:
        """Scores and labels of texts, on the device of the module, without dropout.

        Args:
            texts: strings, or pairs of strings for a model of two texts.
            tokenizer: the one that the model was trained with; None: that of `name_or_path`.
            max_tokens: the most tokens that are computed at once.

        Raises:
            ConfigError: the module does not know its labels, or there is no tokenizer.
            DataError: a text has the wrong form.
        """
        self.configure_model()
        if self.net is None or self.schema is None:
            raise ConfigError(
                "this BGEClassifier has not been trained: use BGEClassifier.load_from_checkpoint(path), or "
                "BGEClassifier(folder) with the folder of an exported model"
            )
        tokenizer = tokenizer or self._load_tokenizer()
        training = self.training
        self.eval()
        try:
            return predict_texts(self.net, self.schema, texts, tokenizer, max_tokens)
        finally:
            self.train(training)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        name, options = self.name_or_path, self._encoder_options
        try:
            return AutoTokenizer.from_pretrained(
                str(Path(name).expanduser()) if name.startswith("~") else name,
                revision=options["revision"],
                trust_remote_code=options["trust_remote_code"],
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name} holds no tokenizer that can be loaded: pass `tokenizer` to predict") from error

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write a folder that transformers and sentence-transformers load: see `export_classifier`.

        Args:
            folder: where to.
            tokenizer: the one the texts were tokenised with.

        Raises:
            ConfigError: the module has no weights yet, or the folder holds something else than an exported model.
        """
        if self.net is None or self.schema is None:
            raise ConfigError("this BGEClassifier has no weights yet: train it, or load a checkpoint, before `export`")
        return export_classifier(self.net, self.schema, tokenizer, folder)


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that a step draws from; `torch.manual_seed` formats a stack trace on every call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _check_arguments(
    *, task: str, dropout: float | None, frozen_layers: int | None, lora: LoRAConfig, attention: str, **_: Any
) -> None:
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if attention not in get_args(Attention):
        raise ConfigError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
    if dropout is not None and not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be from 0 to below 1, or null, got {dropout}")
    if frozen_layers is not None and frozen_layers < 0:
        raise ConfigError(f"frozen_layers must be 0 or more, or null, got {frozen_layers}")
    if lora.r is not None and frozen_layers is not None:
        raise ConfigError(
            f"lora.r={lora.r}, which freezes all layers, and frozen_layers={frozen_layers} exclude each other: "
            "set one of them to null"
        )
