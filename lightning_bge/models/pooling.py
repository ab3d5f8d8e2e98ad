"""How token vectors become the one that a head reads, and the logits of windows those of a row."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_bge.errors import ConfigError
from lightning_bge.models.heads import PACKED_HEADS
from lightning_bge.runtime.model_config import HEAD, POOLING
from lightning_bge.tokenization import Pooling

TokenPooling = Literal["auto", "cls", "mean", "max"]
NATIVE = {"modernbert": ("cls", "mean")}  # what transformers has; of the other architectures with a head here: cls


def pooling_of(config: PretrainedConfig) -> str:
    """`cls`, `mean` or `max`: how a model of this configuration pools, or `cls` where transformers alone knows."""
    native = config.classifier_pooling if config.model_type in NATIVE else "cls"
    return str(getattr(config, POOLING, native))


def is_native(config: PretrainedConfig) -> bool:
    """Whether transformers' own model of this configuration pools in this way, and has this head."""
    return not hasattr(config, POOLING) and not hasattr(config, HEAD)


def set_pooling(config: PretrainedConfig, pooling: TokenPooling) -> str:
    """Let models of a configuration pool in a way, in place.

    Args:
        config: of the checkpoint.
        pooling: `cls`: the first token; `mean` and `max`: over all tokens of a sequence, special tokens counted;
            `auto`: as the checkpoint.

    Returns:
        How the checkpoint's model pools, where that is another way; else an empty text.

    Raises:
        ConfigError: there is no such way, or no head of this architecture reads pooled vectors.
    """
    if pooling not in get_args(TokenPooling):
        raise ConfigError(f"model.pooling: expected one of {', '.join(get_args(TokenPooling))}, got {pooling!r}")
    if pooling == "auto":
        return ""
    kind, before = config.model_type, pooling_of(config)
    if kind not in PACKED_HEADS:
        raise ConfigError(
            f"model.pooling: expected auto, as this model is a {kind}, whose head pools in its own way, got {pooling}. "
            f"{', '.join(PACKED_HEADS)} can pool otherwise"
        )
    if hasattr(config, POOLING):
        delattr(config, POOLING)
    if pooling in NATIVE.get(kind, ()):
        config.classifier_pooling = pooling
    elif pooling != "cls":
        setattr(config, POOLING, pooling)
    return "" if pooling == before else before


def pool_tokens(hidden: Tensor, lengths: Sequence[int], pooling: str) -> Tensor:
    """Token vectors of sequences that lie end to end, [T, hidden] -> [S, hidden].

    Args:
        hidden: there may be more tokens behind those of the sequences.
        lengths: of the sequences.
        pooling: `cls`, or `mean` or `max`, in at least fp32.
    """
    parts = hidden[: sum(lengths)].to(torch.promote_types(hidden.dtype, torch.float32)).split(list(lengths))
    if pooling == "cls":
        return torch.stack([part[0] for part in parts])
    return torch.stack([part.mean(dim=0) if pooling == "mean" else part.amax(dim=0) for part in parts])


def pool_windows(logits: Tensor, windows: tuple[int, ...], pooling: Pooling) -> Tensor:
    """Logits of sequences, [S, outputs] -> logits of rows, [N, outputs], at least in fp32.

    Nothing waits for the device, and the order of all sums is fixed, so that a resumed run repeats them.

    Args:
        logits: the windows of a row follow each other.
        windows: number of windows of each row.
        pooling: their mean, or their maximum for each output.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if max(windows) == 1:
        return wide
    parts = wide.split(windows)
    return torch.stack([part.mean(dim=0) if pooling == "mean" else part.amax(dim=0) for part in parts])
