"""`BGEClassifier`: the LightningModule that fine-tunes an encoder on single texts or pairs of texts."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.effective_batch import EffectiveBatchModule
from lightning_bge.models.encoder import Attention, TextClassifier, build_classifier, expand_home, load_classifier
from lightning_bge.models.head_class import EXPECTED, HeadConfig
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.metrics.class_path import try_class
from lightning_bge.models.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
)
from lightning_bge.models.optimizer_class import LENGTHS
from lightning_bge.models.output.export import export_classifier
from lightning_bge.models.output.inference import Text, TextPredictions, predict_texts, tokenizer_of
from lightning_bge.models.pooling import TokenPooling
from lightning_bge.models.tried_classes import try_classes
from lightning_bge.runtime.class_path import find_class
from lightning_bge.runtime.compat.lightning import estimated_steps
from lightning_bge.runtime.nested_config import as_config, as_plain
from lightning_bge.types import TASKS, Schema, Task

CHECKPOINT_KEY = "lightning_bge"  # of what `load_from_checkpoint` needs besides weights and arguments
ENCODER_OPTIONS = (
    *("attention", "dropout", "seed", "revision", "trust_remote_code"),
    *("gradient_checkpointing", "frozen_layers", "lora", "pooling", "head"),
)  # arguments that the function that loads the encoder gets


class BGEClassifier(EffectiveBatchModule):
    """Fine-tunes an encoder as a text or text-pair classifier, regressor or cross-encoder.

    How a step is computed: see `EffectiveBatchModule`.

    A checkpoint of a run holds the arguments, the label schema and the encoder's configuration:
    `BGEClassifier.load_from_checkpoint(path)` returns a model that predicts, without a data module.

    Args:
        name_or_path: name on the hub or folder of any encoder: `BAAI/bge-small-en-v1.5`, `BAAI/bge-reranker-base`...
        task: binary (yes/no), multiclass, multilabel or regression.
        loss: which loss, class weights, label smoothing. This, the next two, `lora` and `head` may be dicts of
            their fields, such as `optimizer={"lr": 1e-4}`, and name a class by `class_path` and `init_args`.
        optimizer: options of AdamW, or another optimizer; clipping, layer-wise decay of the learning rate.
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
        pooling: what the head reads of a sequence: cls (its first token), mean or max of its tokens; auto: as the
            checkpoint. What transformers' model does not have (mean and max, but for ModernBERT's mean) is exported
            in a form that this package alone loads.
        head: what makes the logits of the pooled vectors: the architecture's own, or a class.

    Attributes:
        hparams: the arguments as plain data; `BGEClassifier(**hparams)` is an equal module.
        load: the function that loads the encoder; `load_encoder_with` sets it.
        schema: what the model reads and predicts: from the data module, a checkpoint or an exported model, or set by
            `set_schema`; None until then.
        net, loss, predictions, oom_retry: see `EffectiveBatchModule`.

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
        pooling: TokenPooling = "auto",
        head: HeadConfig = HeadConfig(),  # noqa: B008
    ) -> None:
        loss = as_config(LossConfig, loss, "loss")
        optimizer = as_config(OptimizerConfig, optimizer, "optimizer")
        schedule = as_config(ScheduleConfig, schedule, "schedule")
        lora = as_config(LoRAConfig, lora, "lora")
        head = as_config(HeadConfig, head, "head")
        given = locals()
        arguments = {name: given[name] for name in inspect.signature(BGEClassifier).parameters}
        _check_arguments(**arguments)
        super().__init__(seed=seed, max_grad_norm=optimizer.max_grad_norm)
        # no logger: the data module's `revision` and `task` have the same names, which Lightning takes for a conflict
        self.save_hyperparameters(as_plain(arguments), logger=False)
        self.name_or_path = name_or_path
        self.task: Task = task
        self.loss_config, self.optimizer_config, self.schedule_config = loss, optimizer, schedule
        self.head_config = head
        self._encoder_options = {name: arguments[name] for name in ENCODER_OPTIONS}
        self.load: Callable[..., TextClassifier] = load_classifier
        self.class_counts: Sequence[float] | None = None
        self._untrained = ""  # why the head was never trained; empty: it was
        self._imports = True  # what `class_path` names; False: the arguments come from a checkpoint
        self._filled: dict[str, int] = {}  # lengths that a schedule by its class was given

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
            wanted = Outputs(self.schema.task, self.schema.labels)
            if not self._imports and self.head_config.class_path is not None:
                find_class(self.head_config.class_path, nn.Module, EXPECTED, imports=False)
            net = self.load(self.name_or_path, wanted, **self._encoder_options)
            if self.schema.max_length > net.max_positions:
                raise ConfigError(
                    f"data.max_length is {self.schema.max_length}, but {self.name_or_path} has positions for "
                    f"{net.max_positions} tokens: set data.max_length to that or less"
                )
            self.net, self._untrained = net, net.untrained
            if isinstance(self.monitored, dict):
                try_class(self.monitored, self.schema)
        if self.loss is None and self._needs_loss():
            counts = self.class_counts
            self.loss = Loss(self.loss_config, self.task, self.schema.num_outputs, counts, imports=self._imports)

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

    def _attached_trainer(self) -> Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # the module is not attached to a trainer
            return None

    def _needs_loss(self) -> bool:
        """False where a model of a checkpoint predicts: a class path in the checkpoint is not even looked up."""
        if self._imports or self.loss_config.class_path is None:
            return True
        trainer = self._attached_trainer()
        return trainer is not None and trainer.state.fn != TrainerFn.PREDICTING

    def _find_schema(self) -> None:
        """From the trainer's data module, else the one that was set, else the one beside an exported model."""
        trainer = self._attached_trainer()
        datamodule = getattr(trainer, "datamodule", None)
        schema = getattr(datamodule, "schema", None)
        if schema is not None:
            self.schema = replace(schema, threshold=self.schema.threshold) if self.schema is not None else schema
            self.class_counts = getattr(datamodule, "class_counts", None)
        if self.schema is None:
            self.schema = Schema.load(expand_home(self.name_or_path))
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
            self._untrained = ""  # a trainer loads the weights
            return
        self._imports = False  # the arguments are those of the checkpoint
        self.schema, self.class_counts = Schema.from_plain(saved["schema"]), saved["class_counts"]
        if saved["encoder"] is not None:
            names = inspect.signature(build_classifier).parameters
            options = {name: value for name, value in self._encoder_options.items() if name in names}
            self.net = build_classifier(saved["encoder"], **options)
        self.configure_model()
        self._untrained = ""

    def configure_optimizers(self) -> Any:
        """Fused AdamW, or the optimizer by its class, and a schedule over all optimizer steps of the run."""
        assert self.net is not None
        steps = estimated_steps(self.trainer)
        if math.isinf(steps):
            raise ConfigError("trainer.max_epochs: a schedule needs to know its length; set it, or trainer.max_steps")
        total = int(steps)
        if self.schedule_config.epochs is not None and self.trainer.max_epochs:
            total = round(steps / self.trainer.max_epochs * self.schedule_config.epochs)
        configs, imports = (self.optimizer_config, self.schedule_config), self._imports
        try_classes(self.net, *configs, total_steps=total, steps=int(steps), imports=imports)
        optimizer = build_optimizer(self.net, self.optimizer_config, imports)
        schedule = build_schedule(optimizer, self.schedule_config, total, imports)
        if self.schedule_config.class_path is not None:
            self._filled = {name: total for name in LENGTHS if vars(schedule).get(name) == total}
        return [optimizer], [schedule]

    # ------------------------------------------------------------------ inference and export

    def on_train_start(self) -> None:
        """The head is trained from here on; a schedule of another length, from a checkpoint, is refused."""
        super().on_train_start()
        self._untrained = ""
        held = vars(self.lr_schedulers())
        for name, total in self._filled.items():
            if held[name] != total:
                raise ConfigError(
                    f"model.schedule.class_path: the checkpoint's schedule has {name}={held[name]}, and this run "
                    f"{total} optimizer steps. Resume with the epochs and rows of its run, or train its model in a new "
                    "run"
                )

    def on_validation_start(self) -> None:
        """Refuse to score with a head that was never trained; a checkpoint's weights are there by now."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._check_trained()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self._check_trained()

    def on_predict_start(self) -> None:
        """As `on_validation_start`."""
        self._check_trained()

    def _check_trained(self) -> None:
        if self._untrained:
            raise ConfigError(f"model.name_or_path: {self.name_or_path} {self._untrained}")

    def predict(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None = None, max_tokens: int = 8192
    ) -> TextPredictions:
        """Scores and labels of texts, on the device of the module, without dropout.

        Args:
            texts: strings, or pairs of strings for a model of two texts.
            tokenizer: the one that the model was trained with; None: that of `name_or_path`.
            max_tokens: the most tokens that are computed at once.

        Raises:
            ConfigError: the module does not know its labels, its head was never trained, or there is no tokenizer.
            DataError: a text has the wrong form.
        """
        self.configure_model()
        if self.net is None or self.schema is None:
            raise ConfigError(
                "this BGEClassifier has not been trained: use BGEClassifier.load_from_checkpoint(path), or "
                "BGEClassifier(folder) with the folder of an exported model"
            )
        self._check_trained()
        if tokenizer is None:
            options = {name: self.hparams[name] for name in ("revision", "trust_remote_code")}
            tokenizer = tokenizer_of(self.name_or_path, **options)
        return predict_texts(self.net, self.schema, texts, tokenizer, max_tokens)

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
        return export_classifier(self.net, self.schema, tokenizer, folder, base_model=self.name_or_path)


def _check_arguments(
    *,
    task: Task,
    loss: LossConfig,
    dropout: float | None,
    frozen_layers: int | None,
    lora: LoRAConfig,
    attention: str,
    pooling: str,
    **_: Any,
) -> None:
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    loss.name_for(task)
    if attention not in get_args(Attention):
        raise ConfigError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
    if pooling not in get_args(TokenPooling):
        raise ConfigError(f"pooling must be one of {', '.join(get_args(TokenPooling))}, got {pooling!r}")
    if dropout is not None and not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be from 0 to below 1, or null, got {dropout}")
    if frozen_layers is not None and frozen_layers < 0:
        raise ConfigError(f"frozen_layers must be 0 or more, or null, got {frozen_layers}")
    if lora.r is not None and frozen_layers is not None:
        raise ConfigError(
            f"lora.r={lora.r}, which freezes all layers, and frozen_layers={frozen_layers} exclude each other: "
            "set one of them to null"
        )
