"""The work in a batch, real tokens and padding, and the FLOPs of training on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_bge.runtime.compat.torch import tree_leaves
from lightning_bge.types import Batch

Count = int | Tensor
CountBatch = Callable[[Any], tuple[int, Count]]


@dataclass(frozen=True)
class Work:
    """Sums over batches, and the time they took. The difference of two is what was done in between.

    Attributes:
        sequences: in the batches.
        tokens: real ones; a 0-d tensor where they are counted on a device; 0 where batches have none that is known.
        squares: the sum of squared lengths, also a tensor there; 0 where lengths are not known.
        computed: tokens that a forward pass computes, padding included; None: not known.
        seconds: of training on them.
        waited: of these, between the end of a batch and the start of the next one.
    """

    sequences: int = 0
    tokens: Count = 0
    squares: Count = 0
    computed: int | None = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1)

    def __sub__(self, other: Work) -> Work:
        return self._with(other, -1)

    def _with(self, other: Work, sign: int) -> Work:
        known = self.computed is not None and other.computed is not None
        return Work(
            self.sequences + sign * other.sequences,
            self.tokens + sign * other.tokens,
            self.squares + sign * other.squares,
            self.computed + sign * other.computed if known else None,  # type: ignore[operator]
            self.seconds + sign * other.seconds,
            self.waited + sign * other.waited,
        )

    @property
    def has_tokens(self) -> bool:
        """Whether tokens are known."""
        return isinstance(self.tokens, Tensor) or self.tokens > 0

    @property
    def padding(self) -> float | Tensor | None:
        """The share, 0 to 1, of the computed tokens that are padding; None: not known."""
        if self.computed is None:
            return None
        return 1 - self.tokens / self.computed if self.computed else 0.0

    def on_host(self) -> Work | None:
        """The same in plain numbers; None where they are on a GPU, as reading them would wait for it."""
        counts = (self.tokens, self.squares)
        if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in counts):
            return None
        return Work(self.sequences, int(self.tokens), int(self.squares), self.computed, self.seconds, self.waited)


def count_sequences_and_tokens(batch: Any) -> tuple[int, Count]:
    """Sequences and real tokens of a batch: a `Batch` of this package, or a mapping with an `attention_mask` [N, T].

    The mask's sum stays a tensor: to read it would be to wait for the device. Any other batch has the rows of its first
    tensor, and 0 tokens: what a token of it is, is not known.

    Raises:
        TypeError: the batch holds no tensor; give `Throughput` a `count` of your own.
    """
    if isinstance(batch, Batch):
        return batch.size, batch.tokens
    if (mask := _mask(batch)) is not None:
        return len(mask), mask.sum()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf), 0
    raise TypeError(
        f"Throughput counts the rows of tensors, got {type(batch).__name__} without any: pass "
        "count=lambda batch: (sequences, tokens)"
    )


def _mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def work_of(batch: Any, encoder: Any = None, count: CountBatch = count_sequences_and_tokens) -> Work:
    """The work in a batch; no tensor is read.

    Args:
        batch: a `Batch` of this package, a mapping with an `attention_mask` [N, T], or what `count` takes. With a
            `count` of the user's own neither padding nor squared lengths are known.
        encoder: the part of the module whose `computed_tokens` returns what it computes of a `MicroBatch`; None:
            padding is not known.
        count: see `Throughput`.
    """
    sequences, tokens = count(batch)
    if count is not count_sequences_and_tokens:
        return Work(sequences, tokens, computed=None)
    if isinstance(batch, Batch):
        squares = sum(length * length for part in batch.micro for length in part.lengths)
        computed = None if encoder is None else sum(map(encoder.computed_tokens, batch.micro))
        return Work(sequences, tokens, squares, computed)
    mask = _mask(batch)
    if mask is None or mask.ndim != 2:
        return Work(sequences, tokens, computed=None)
    return Work(sequences, tokens, mask.sum(1).square().sum(), mask.numel())


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of training, forward and backward, by a module (PaLM, appendix B, arXiv:2204.02311).

    Attributes:
        per_token: 6 for each parameter outside of embedding tables; 2 for one that is frozen.
        per_square: 12 x layers x hidden size, for each token that a token attends to; 0 where no part of the module
            has a transformers `config` that names them.
    """

    per_token: int
    per_square: int

    @classmethod
    def of(cls, module: nn.Module) -> TrainFlops:
        """The FLOPs of a module; parts that are computed for a sequence's first token alone count for all tokens."""
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        apart = {id(parameter) for table in tables for parameter in table.parameters()}
        counted = [parameter for parameter in module.parameters() if id(parameter) not in apart]
        for part in module.modules():
            config: Any = getattr(part, "config", None)
            if hasattr(config, "num_hidden_layers") and hasattr(config, "hidden_size"):
                per_square = 12 * config.num_hidden_layers * config.hidden_size
                break
        else:
            per_square = 0
        return cls(sum(p.numel() * (6 if p.requires_grad else 2) for p in counted), per_square)

    def total(self, work: Work) -> float | Tensor:
        """FLOPs of that work; padding is not counted."""
        return self.per_token * work.tokens + self.per_square * work.squares


def matmul_dtype(trainer: Trainer, module: LightningModule) -> torch.dtype:
    """What matrices are multiplied in: autocast's type in mixed precision, else the parameters' own."""
    precision = str(trainer.precision)
    if precision.endswith("-mixed"):
        return torch.bfloat16 if precision.startswith("bf16") else torch.float16
    types = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(types, torch.float32)
