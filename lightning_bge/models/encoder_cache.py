"""Encoders that serve many trials: reset in place instead of read from disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bge.models.attention.bert_layers import BERT_LIKE
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.head_class import head_of
from lightning_bge.models.memory_saving.freezing import freeze_layers
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.runtime.compat.torch import copy_all
from lightning_bge.runtime.memory import limits, register_cache, release
from lightning_bge.runtime.model_config import is_head

# Of the host's memory. An encoder in training takes five times its weights and its activations: the weights and their
# initial values, which are counted here, and gradients and AdamW's two moments, which are not.
HOST_FRACTION = 0.25
HOST = torch.device("cpu")


class EncoderCache:
    """Loads as `load_classifier` does, but returns an encoder that it holds, with its initial weights copied back.

    Equal to a fresh load bit for bit. What was compiled stays compiled, and the weights stay on their device. The
    encoder that was returned before must no longer be in use. Another model, head, attention or LoRA is read from disk;
    so is another seed, for its head, and for architectures other than BERT's another dropout, as these are built with
    it. Frozen layers and gradient checkpointing are set in place.

    Within `limit` encoders that are not in use are kept as well, in the host's memory whatever the device, with their
    initial weights alone. Before another one is read, the least recently used ones are dropped until it fits beside the
    rest; what was never read is assumed to be as large as the largest one held, and once it is read, its own size
    counts. The one in use is kept even if it alone is larger. If a step runs out of memory, all others are dropped.

    Args:
        limit: bytes of all that is held; the one in use counts with its weights and their initial values. 0: only the
            one in use. None: `HOST_FRACTION` of the host's memory, or of what limits on this process allow if that is
            less, and never more than half of what is free, counted with what is held, as other processes do the same.
            Where no limit is known, as on macOS, that is 0.
        granted: bytes that the user grants this process; one of those limits.

    Attributes:
        loads: how many times a model was read from disk.
        load_seconds: seconds spent in `load`, reading or resetting.
        capacity: the most bytes that are held once an encoder is returned, unless a single one is larger.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderCache:
        """A copy of a module, such as the average of its weights, loads from the same cache."""
        return self

    def __init__(self, limit: int | None = 0, granted: int | None = None) -> None:
        self.loads = 0
        self.load_seconds = 0.0
        self._limits = partial(limits, HOST, granted)
        self._automatic = limit is None
        total = min((known.total for known in self._limits()), default=0)
        self.capacity = int(HOST_FRACTION * total) if limit is None else limit
        self._entries: list[_CachedEncoder] = []  # the least recently used first; the last one is in use
        self._sizes: dict[str, int] = {}  # of all that were read
        if self.capacity > 0:
            register_cache(self)

    def load(
        self,
        name_or_path: str,
        outputs: int | Outputs,
        *,
        dropout: float | None = None,
        seed: int = 42,
        gradient_checkpointing: bool = False,
        frozen_layers: int | None = None,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - frozen
        **options: Any,
    ) -> TextClassifier:
        """See `load_classifier`, whose arguments these are."""
        since = time.perf_counter()
        options["lora"] = lora
        key = repr((name_or_path, outputs, sorted(options.items())))
        read = partial(self._read, name_or_path, outputs, **options)
        entry = next((each for each in self._entries if each.serves(key, dropout, seed)), None)
        if entry is None or entry is not self._entries[-1]:
            entry = self._put_into_use(entry, key, partial(_CachedEncoder, key, read, dropout, seed))
        entry.reset(read, dropout, seed)
        if frozen_layers is not None:
            freeze_layers(entry.net.model, frozen_layers)
        set_gradient_checkpointing(entry.net, gradient_checkpointing)
        self.load_seconds += time.perf_counter() - since
        return entry.net

    def _put_into_use(
        self, entry: _CachedEncoder | None, key: str, make: Callable[[], _CachedEncoder]
    ) -> _CachedEncoder:
        """Make another encoder the one in use; `make` reads it if it is not held."""
        free = self._free_capacity()
        largest = max((each.size for each in self._entries), default=0)
        if entry is not None:
            self._entries.remove(entry)
        self._drop(free - self._sizes.get(key, largest))  # before the next one is read
        for idle in self._entries:
            idle.make_idle()
        if entry is None:
            entry = make()
            self._sizes[key] = entry.size
            self._drop(free - entry.size)
        self._entries.append(entry)
        return entry

    def _drop(self, free: int) -> None:
        """Drop idle encoders until they fit."""
        before = len(self._entries)
        while self._entries and sum(each.idle_size for each in self._entries) > free:
            del self._entries[0]
        if len(self._entries) < before:
            release(host=False)

    def _free_capacity(self) -> int:
        if not self._automatic or self.capacity == 0:
            return self.capacity
        held = sum(each.nbytes for each in self._entries if each.on_host)
        return min(self.capacity, (min(limit.free for limit in self._limits()) + held) // 2)

    def shrink(self) -> None:
        """Drop all but the one in use."""
        del self._entries[:-1]

    def clear(self) -> None:
        """Hold nothing; the next load reads from disk."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held: parameters, buffers, and the parameters' initial values."""
        return sum(each.nbytes for each in self._entries)

    def _read(self, *args: Any, **options: Any) -> TextClassifier:
        self.loads += 1
        return load_classifier(*args, **options)


class _CachedEncoder:
    """An encoder, and what is needed to reset it."""

    def __init__(self, key: str, read: Callable[..., TextClassifier], dropout: float | None, seed: int) -> None:
        self.key, self.dropout, self.seed = key, dropout, seed
        self.net = read(seed=seed)
        self.rates = _rates(self.net)  # the checkpoint's, if they can be set in place
        if self.rates is None and dropout is not None:
            self.net = read(dropout=dropout, seed=seed)
        # buffers are not listed: these encoders' are constants
        self.parameters: list[Tensor] = list(self.net.parameters())
        self.trained = [one.requires_grad for one in self.parameters]  # whether each is where no layers are frozen
        self.weights = [one.detach() for one in self.parameters]  # the parameters' initial values
        self.idle = True
        self.idle_size = self.nbytes
        self.make_ready()
        self.size = self.nbytes

    def serves(self, key: str, dropout: float | None, seed: int) -> bool:
        # a head by its class may draw buffers from the seed; all other buffers are constants
        other_buffers = seed != self.seed and any(is_head(name) for name, _ in self.net.named_buffers())
        return key == self.key and (self.rates is not None or dropout == self.dropout) and not other_buffers

    @property
    def nbytes(self) -> int:
        held = [*self.parameters, *self.net.buffers(), *self.weights]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())

    @property
    def on_host(self) -> bool:
        return self.parameters[0].device == HOST

    def make_idle(self) -> None:
        """Move to the host's memory, with the initial weights as parameters: one copy instead of two."""
        if self.idle:
            return
        self.weights = [weight.to(HOST) for weight in self.weights]
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.grad, parameter.data = None, weight
        self.net.to(HOST)  # the buffers
        self.idle = True

    def make_ready(self) -> None:
        if self.idle:
            self.weights = [weight.clone() for weight in self.weights]
            self.idle = False

    def reset(self, read: Callable[..., TextClassifier], dropout: float | None, seed: int) -> None:
        self.make_ready()
        if seed != self.seed:
            self.weights = [one.detach() for one in read(dropout=dropout, seed=seed).parameters()]
            self.seed = seed
        device = self.parameters[0].device
        if self.weights[0].device != device:
            self.weights = [weight.to(device) for weight in self.weights]
        with torch.no_grad():
            copy_all(self.parameters, self.weights)
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            parameter.grad, parameter.requires_grad = None, trained
        self.net.train()
        for module, rate in self.rates or ():
            module.p = rate if dropout is None else dropout


def _rates(net: TextClassifier) -> list[tuple[CheapDropout, float]] | None:
    """All dropout modules with their rates; None: the architecture holds rates elsewhere too."""
    if net.model.config.model_type not in BERT_LIKE:
        return None
    by_class = head_of(net.model.config).class_path is not None  # whose dropout is among its own arguments
    named = [(name, part) for name, part in net.named_modules() if isinstance(part, CheapDropout)]
    return [(module, module.p) for name, module in named if not (by_class and is_head(name))]
