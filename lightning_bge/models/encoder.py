"""Any transformers encoder with its sequence-classification head, fed with micro-batches."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lightning_bge.errors import ConfigError
from lightning_bge.models.attention.bert_layers import BERT_LIKE, use_packed_layers
from lightning_bge.models.attention.packed import PACKED, register_packed_attention
from lightning_bge.models.attention.packing import Packing, pad_to_bucket
from lightning_bge.models.checkpoint_head import (
    Outputs,
    has_head,
    match_head,
    rearrange_outputs,
    reset_head,
)
from lightning_bge.models.dropout import use_cheap_dropout
from lightning_bge.models.head_class import HeadConfig, head_of, use_head
from lightning_bge.models.heads import PACKED_HEADS, apply_head
from lightning_bge.models.memory_saving.freezing import freeze_layers
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig, add_lora
from lightning_bge.models.pooling import TokenPooling, is_native, pool_tokens, pool_windows, pooling_of, set_pooling
from lightning_bge.runtime.compat.transformers import attention_implementation
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.model_config import HEAD_FILE, is_head, read_config
from lightning_bge.types import ENSEMBLE_FILE, MicroBatch

log = logging.getLogger(__name__)

Attention = Literal["auto", "packed", "padded"]


class TextClassifier(nn.Module):
    """A `...ForSequenceClassification` model that reads micro-batches, packed where its architecture allows.

    Args:
        model: the transformers model; its parameters and keys do not change, so that transformers loads what is saved.
        attention: `packed` (no padding), `padded` (every architecture), or `auto`: packed where that is possible.

    Attributes:
        packed: whether sequences are computed without padding.
        untrained: why the head was never trained, to follow the model's name in a sentence; empty: it was.
        pooling: how token vectors are pooled: see `set_pooling`.
        token_bucket: round a packed micro-batch's tokens up to a multiple of this with dummy sequences, as CUDA graphs
            need few shapes; None, the default, does not round.

    Raises:
        ConfigError: `packed` with an architecture that does not route through the attention interface.
    """

    def __init__(self, model: PreTrainedModel, attention: Attention = "auto") -> None:
        super().__init__()
        can_pack = model.config.model_type in PACKED_HEADS
        if attention == "packed" and not can_pack:
            raise ConfigError(
                f"model.attention is packed, which needs one of {', '.join(PACKED_HEADS)}; "
                f"this model is a {model.config.model_type}: use auto or padded"
            )
        use_cheap_dropout(model)
        self.model = model
        self.pooling = pooling_of(model.config)
        self.packed = can_pack and attention != "padded"
        self.untrained = ""
        self.token_bucket: int | None = None
        if self.packed:
            register_packed_attention()
            model.set_attn_implementation(PACKED)
            if model.config.model_type in BERT_LIKE:
                use_packed_layers(model.base_model.encoder.layer, first_tokens_only=self.pooling == "cls")

    @property
    def attention(self) -> str:
        """The attention implementation in use, as transformers names it."""
        return str(attention_implementation(self.model))

    @property
    def max_positions(self) -> int:
        """The longest sequence in tokens that fits into the model's table of positions; no table, no limit."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa and XLM-RoBERTa count from behind the padding's index, and give the table a padding index
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return sys.maxsize

    def computed_tokens(self, micro: MicroBatch) -> int:
        """Tokens that a forward pass computes, padding and dummy sequences included."""
        if not self.packed:
            return len(micro.lengths) * max(micro.lengths)
        tokens = sum(micro.lengths)
        if self.token_bucket is None:
            return tokens
        return -(-(tokens + 1) // self.token_bucket) * self.token_bucket  # as `pad_to_bucket`: a dummy token at least

    def forward(self, micro: MicroBatch) -> Tensor:
        """Logits, [N, outputs], in the order of the micro-batch's rows."""
        logits = self._packed(micro) if self.packed else self._padded(micro)
        return logits if micro.windows is None else pool_windows(logits, micro.windows, micro.pooling)

    def _packed(self, micro: MicroBatch) -> Tensor:
        config = self.model.config
        fed = micro if self.token_bucket is None else pad_to_bucket(micro, self.token_bucket)
        positions = fed.positions
        if config.model_type in ("roberta", "xlm-roberta"):
            positions = positions + (config.pad_token_id + 1)
        inputs: dict[str, Any] = {
            "input_ids": fed.input_ids[None],
            "position_ids": positions[None],
            "packing": Packing(fed.lengths, fed.cu_seqlens),
        }
        if config.model_type != "modernbert":
            inputs["token_type_ids"] = self._token_types(fed)[None]
        hidden = self.model.base_model(**inputs).last_hidden_state[0]
        return self._head(self._pool(hidden, micro))

    def _head(self, pooled: Tensor) -> Tensor:
        # the head in full precision: bf16 logits have 8 bits, so that the scores of many rows would be the same
        with torch.autocast(pooled.device.type, enabled=False):
            return apply_head(self.model, pooled.to(self.model.dtype))

    def _pool(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """What the layers gave -> [S, hidden]: each sequence's first token, or the mean or maximum of its tokens."""
        if self.pooling != "cls":
            return pool_tokens(hidden, micro.lengths, self.pooling)
        if self.model.config.model_type in BERT_LIKE:
            return hidden[: len(micro.lengths)]  # the last layer gave the first tokens alone
        return hidden.index_select(0, micro.cu_seqlens[:-1])

    def _token_types(self, micro: MicroBatch) -> Tensor:
        if micro.token_type_ids is None or self.model.config.type_vocab_size < 2:
            return torch.zeros_like(micro.input_ids)
        return micro.token_type_ids

    def _padded(self, micro: MicroBatch) -> Tensor:
        def pad(flat: Tensor, value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(flat.split(micro.lengths)), batch_first=True, padding_value=value)

        inputs = {
            "input_ids": pad(micro.input_ids, self.model.config.pad_token_id or 0),
            "attention_mask": pad(torch.ones_like(micro.input_ids), 0),
        }
        if micro.token_type_ids is not None and getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = pad(micro.token_type_ids, 0)
        if is_native(self.model.config):
            return self.model(**inputs).logits
        hidden = self.model.base_model(**inputs).last_hidden_state
        flat = torch.cat([row[:length] for row, length in zip(hidden, micro.lengths, strict=True)])
        return self._head(pool_tokens(flat, micro.lengths, self.pooling))


def load_classifier(
    name_or_path: str,
    outputs: int | Outputs,
    *,
    attention: Attention = "auto",
    dropout: float | None = None,
    seed: int = 42,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    frozen_layers: int | None = None,
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - frozen
    pooling: TokenPooling = "auto",
    head: HeadConfig = HeadConfig(),  # noqa: B008
) -> TextClassifier:
    """Load an encoder with a classification head from the hub or a folder, in fp32 and in train mode.

    fp32 whatever the checkpoint's dtype: a bf16 checkpoint would train without master weights. Train mode because
    `from_pretrained` returns eval mode and Lightning does not change it: dropout would be silently off.

    Args:
        name_or_path: hub name or folder.
        outputs: what the outputs are to mean. A head of the checkpoint is kept where it was trained for that, with its
            outputs matched by their names (`match_head`). With a number alone it is kept where its width fits.
        attention: see `TextClassifier`.
        dropout: overrides every dropout probability of the model's configuration; None keeps them.
        seed: what a new head, and LoRA's factors, are drawn from.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code from the hub may run; off by default.
        gradient_checkpointing: see `set_gradient_checkpointing`.
        frozen_layers: see `freeze_layers`; None freezes nothing.
        lora: see `LoRAConfig`.
        pooling: see `set_pooling`. A head that was trained with another one is kept, as a start.
        head: see `HeadConfig`.

    Returns:
        The classifier; where its head is new, `untrained` says why, and one line was logged.

    Raises:
        ConfigError: there is no such model, it can't be reached, or it has no sequence-classification form;
            the architecture does not support gradient checkpointing, frozen layers, LoRA or another head; or the
            checkpoint alone names the class of its head; see `allow_class`.
    """
    name_or_path = expand_home(name_or_path)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = read_config(name_or_path, **source)
        before = set_pooling(config, pooling)
        how = ((dropout, pooling), seed, source)
        if head.class_path is None and head_of(config).class_path is None:
            model, untrained = _load_with_head(name_or_path, config, outputs, *how)
        else:
            model, untrained = _load_with_head_by_class(name_or_path, config, outputs, head, *how)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(why_not_loaded(name_or_path, error)) from error
    net = prepare_classifier(
        model,
        attention=attention,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        frozen_layers=frozen_layers,
        lora=lora,
    )
    if before and not untrained:
        untrained = f"has a head that was trained with {before} pooling. Set model.pooling to auto or {before}"
    net.untrained = untrained
    return net


def _load_with_head(
    name_or_path: str,
    config: PretrainedConfig,
    outputs: int | Outputs,
    changes: tuple[float | None, TokenPooling],
    seed: int,
    source: dict[str, Any],
) -> tuple[PreTrainedModel, str]:
    """The model with the wanted outputs, and why its head was never trained; empty: it was."""
    match = None
    if isinstance(outputs, Outputs):
        match, outputs = match_head(config, outputs) if has_head(config) else None, outputs.count
    if match is not None and match.matrix is not None:
        width = match.matrix.shape[1]
        model, new = _load(name_or_path, width, changes, seed, source)
        if not new:
            rearrange_outputs(model, match.matrix)
            if match.note:
                log_once(log, logging.INFO, f"{name_or_path}: {match.note}")
            return model, ""
        if width == outputs:
            return model, _log_new_weights(name_or_path, new)
    model, new = _load(name_or_path, outputs, changes, seed, source)
    if match is None or match.matrix is not None:
        return model, _log_new_weights(name_or_path, new) if new else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset_head(model)
    log_once(log, logging.INFO, f"{name_or_path} {match.why_not}: its last layer starts at random")
    return model, f"{match.why_not}. {match.remedy}"


def _load_with_head_by_class(
    name_or_path: str,
    config: PretrainedConfig,
    outputs: int | Outputs,
    head: HeadConfig,
    changes: tuple[float | None, TokenPooling],
    seed: int,
    source: dict[str, Any],
) -> tuple[PreTrainedModel, str]:
    """As `_load_with_head`, with the head that is asked for by its class, or else the checkpoint's."""
    saved, count = head_of(config), outputs if isinstance(outputs, int) else outputs.count
    match = match_head(config, outputs) if isinstance(outputs, Outputs) and saved.class_path is not None else None
    matrix = torch.eye(count) if match is None else match.matrix
    model, new = _load(name_or_path, count, changes, seed, source)
    use_head(model, head, seed)
    # not what transformers' own head has, which is no longer there
    new = [name for name in new if not is_head(name) and "pooler" not in name and not name.startswith("head.")]
    if head in (saved, HeadConfig()) and matrix is not None and len(matrix) == config.num_labels == count:
        weights = load_file(cached_file(name_or_path, HEAD_FILE, revision=source["revision"]))
        try:
            model.classifier.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(
                f"model.name_or_path: the head of {name_or_path} does not fit into {saved.class_path}, which has "
                f"changed since it was exported: {' '.join(str(error).split())}"
            ) from error
        rearrange_outputs(model, matrix)
        return model, _log_new_weights(name_or_path, new) if new else ""
    new += [f"classifier.{name}" for name in model.classifier.state_dict()]
    untrained = _log_new_weights(name_or_path, new)
    return model, untrained if match is None or match.matrix is not None else f"{match.why_not}. {match.remedy}"


def _load(
    name_or_path: str,
    num_outputs: int,
    changes: tuple[float | None, TokenPooling],
    seed: int,
    source: dict[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """The model with a head of that width, and the names of weights that are not in the checkpoint."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        config = read_config(name_or_path, num_labels=num_outputs, **source)
        dropout, pooling = changes
        _set_dropout(config, dropout)
        set_pooling(config, pooling)
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            **source,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})


def build_classifier(
    config: Mapping[str, Any],
    *,
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
    frozen_layers: int | None = None,
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008
) -> TextClassifier:
    """Build an encoder with a classification head, whose weights are to be loaded afterwards, in train mode.

    Nothing is read from the hub or a folder.

    Args:
        config: `to_dict()` of the configuration of a model that `load_classifier` has loaded.
        attention: see `TextClassifier`. This and the next three as in `load_classifier`.
        gradient_checkpointing: see `set_gradient_checkpointing`.
        frozen_layers: see `freeze_layers`; None freezes nothing.
        lora: see `LoRAConfig`.

    Raises:
        ConfigError: the configuration alone names the class of its head; see `allow_class`.
    """
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    use_head(model, HeadConfig(), seed=0)
    return prepare_classifier(
        model,
        attention=attention,
        seed=0,
        gradient_checkpointing=gradient_checkpointing,
        frozen_layers=frozen_layers,
        lora=lora,
    )


def prepare_classifier(
    model: PreTrainedModel,
    *,
    attention: Attention,
    seed: int,
    gradient_checkpointing: bool,
    frozen_layers: int | None,
    lora: LoRAConfig,
) -> TextClassifier:
    """A transformers model as `load_classifier` returns it; its arguments have the same meaning here."""
    net = TextClassifier(model, attention).train()
    if lora.r is not None:
        add_lora(model, lora, seed)
    if frozen_layers is not None:
        freeze_layers(model, frozen_layers)
    set_gradient_checkpointing(model, gradient_checkpointing)
    return net


def expand_home(name_or_path: str) -> str:
    """A folder that begins with `~` as an absolute path; other names are unchanged."""
    return str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path


def _set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    if dropout is None:
        return
    for field, value in config.to_dict().items():
        if "dropout" in field and isinstance(value, (int, float)):
            setattr(config, field, dropout)


def _log_new_weights(name_or_path: str, new: Sequence[str]) -> str:
    """Log which weights start at random; returns what they mean for a model that is not trained further."""
    inner = [key for key in new if not any(part in key for part in ("classifier", "pooler", "score", "head"))]
    names = ", ".join(new)
    if inner:
        log.warning("%s: %d weights are not in the checkpoint and start at random: %s", name_or_path, len(inner), inner)
    else:
        text = f"{name_or_path}: the checkpoint has no head of this shape; these start at random: {names}"
        log_once(log, logging.INFO, text)
    what = f"has no trained head: {names} would be random numbers" if not inner else f"lacks weights: {names}"
    return f"{what}. Name a trained model, such as the folder model of a run, or train this one first"


def why_not_loaded(name_or_path: str, error: Exception) -> str:
    """What a user can do about an error with which transformers refuses a name or folder."""
    reason = str(error).strip().split("\n")[0]
    if Path(name_or_path, ENSEMBLE_FILE).is_file():
        return (
            f"model.name_or_path: {name_or_path} holds several models, whose scores are averaged by "
            "`lightning-bge predict` and `lightning_bge.models.Ensemble`. Use these, or name one folder in it"
        )
    if Path(name_or_path).exists():
        return (
            f"model.name_or_path: {name_or_path} is not a folder that transformers loads as a text classifier "
            f"({reason}): it needs a config.json and model.safetensors of an encoder"
        )
    if name_or_path.startswith((".", "/")) or name_or_path.count("/") > 1:
        return f"model.name_or_path: the folder {name_or_path} does not exist. Correct the path"
    return (
        f"model.name_or_path: neither a folder nor a model that the hub gave: {name_or_path} ({reason}). "
        "Check the name, the network, and HF_HUB_OFFLINE; or name a folder that holds the model"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' loading report and progress bars; `_log_new_weights` logs what matters in them."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
