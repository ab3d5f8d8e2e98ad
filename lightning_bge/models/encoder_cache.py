"""Live encoders for many trials: reset in place instead of loaded anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bge.models.attention.bert_layers import BERT_LIKE
from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.memory_saving.freezing import freeze_layers
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.runtime.compat.torch import copy_all
from lightning_bge.runtime.memory import limits, register_cache, release

# Of the host's memory. An encoder in training takes five times its weights and its activations: the weights and their
# first values, which are counted here, and gradients and AdamW's two moments, which are not.
SHARE = 0.25
HOST = torch.device("cpu")


class EncoderCache:
    """Loads as `load_classifier` does, but hands out an encoder that it has, with its first weights copied back.

    Equal to a fresh load bit for bit; what was compiled stays so, and the weights stay on the device where they are.
    What was handed out before must no longer be in use. Another model, head, attention or LoRA is loaded from disk;
    another seed too, for its head, and for architectures other than BERT's another dropout, as they are built by it.
    Frozen layers and gradient checkpointing are set in place.

    Within `limit` those that are not in use are kept as well, for when they are asked for again. They wait in the
    host's memory, whatever the device, and hold their first weights alone. Before another one is read the least
    recently used are dropped until it fits beside the rest; what was never read is taken to be as large as the largest
    one held, and once it is there, its own size counts. The one in use is kept even where it alone is larger. Where a
    step runs out of memory, all that wait are dropped.

    Args:
        limit: bytes of all that is held, the one in use counted with its weights and their first values. 0: only the
            one in use. None: `SHARE` of the host's memory, or of what limits on this process allow where that is less,
            and never more than half of what is free, counted with what is held, as other processes do the same. Where
            no limit is known, as on macOS, that is 0.
        given: bytes that the user grants this process; one of those limits.

    Attributes:
        loads: how many times a model was read from disk.
        load_seconds: seconds spent in `load`, reading or resetting.
        capacity: bytes that are held at the most once an encoder is handed out, but where a single one is larger.
    """

    def __init__(self, limit: int | None = 0, given: int | None = None) -> None:
        self.loads = 0
        self.load_seconds = 0.0
        self._limits = partial(limits, HOST, given)
        self._shares = limit is None
        total = min((known.total for known in self._limits()), default=0)
        self.capacity = int(SHARE * total) if limit is None else limit
        self._held: list[_Warm] = []  # the least recently used first; the last one is in use
        self._sizes: dict[str, int] = {}  # of all that were read
        if self.capacity > 0:
            register_cache(self)

    def load(
        self,
        name_or_path: str,
        num_outputs: int,
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
        key = repr((name_or_path, num_outputs, sorted(options.items())))
        read = partial(self._read, name_or_path, num_outputs, **options)
        warm = next((one for one in self._held if one.serves(key, dropout)), None)
        if warm is None or warm is not self._held[-1]:
            warm = self._change(warm, key, partial(_Warm, key, read, dropout, seed))
        warm.reset(read, dropout, seed)
        if frozen_layers is not None:
            freeze_layers(warm.net.model, frozen_layers)
        set_gradient_checkpointing(warm.net, gradient_checkpointing)
        self.load_seconds += time.perf_counter() - since
        return warm.net

    def _change(self, warm: _Warm | None, key: str, make: Callable[[], _Warm]) -> _Warm:
        """Put another encoder into use; `make` reads it where it is not there."""
        room = self._room()
        largest = max((one.size for one in self._held), default=0)
        if warm is not None:
            self._held.remove(warm)
        self._drop(room - self._sizes.get(key, largest))  # before the next one is there
        for idle in self._held:
            idle.park()
        if warm is None:
            warm = make()
            self._sizes[key] = warm.size
            self._drop(room - warm.size)
        self._held.append(warm)
        return warm

    def _drop(self, room: int) -> None:
        """Drop waiting ones until they fit."""
        before = len(self._held)
        while self._held and sum(one.idle_size for one in self._held) > room:
            del self._held[0]
        if len(self._held) < before:
            release(host=False)

    def _room(self) -> int:
        if not self._shares or self.capacity == 0:
            return self.capacity
        held = sum(one.nbytes for one in self._held if one.on_host)
        return min(self.capacity, (min(limit.free for limit in self._limits()) + held) // 2)

    def shrink(self) -> None:
        """Drop all but the one in use."""
        del self._held[:-1]

    def let_go(self) -> None:
        """Hold nothing; the next load reads from disk."""
        self._held.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held: parameters, buffers, and the parameters' first values."""
        return sum(one.nbytes for one in self._held)

    def _read(self, *args: Any, **options: Any) -> TextClassifier:
        self.loads += 1
        return load_classifier(*args, **options)


class _Warm:
    """One encoder and what it takes to reset it."""

    def __init__(self, key: str, read: Callable[..., TextClassifier], dropout: float | None, seed: int) -> None:
        self.key, self.dropout, self.seed = key, dropout, seed
        self.net = read(seed=seed)
        self.rates = _rates(self.net)  # the checkpoint's, where they can be set in place
        if self.rates is None and dropout is not None:
            self.net = read(dropout=dropout, seed=seed)
        # buffers are not listed: these encoders' are constants
        self.parameters: list[Tensor] = list(self.net.parameters())
        self.trained = [one.requires_grad for one in self.parameters]  # whether each is where no layers are frozen
        self.weights = [one.detach() for one in self.parameters]  # the parameters' first values
        self.parked = True
        self.idle_size = self.nbytes
        self.unpark()
        self.size = self.nbytes

    def serves(self, key: str, dropout: float | None) -> bool:
        return key == self.key and (self.rates is not None or dropout == self.dropout)

    @property
    def nbytes(self) -> int:
        held = [*self.parameters, *self.net.buffers(), *self.weights]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())

    @property
    def on_host(self) -> bool:
        return self.parameters[0].device == HOST

    def park(self) -> None:
        """Wait in the host's memory, with the first weights for parameters: one copy instead of two."""
        if self.parked:
            return
        self.weights = [weight.to(HOST) for weight in self.weights]
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.grad, parameter.data = None, weight
        self.net.to(HOST)  # the buffers
        self.parked = True

    def unpark(self) -> None:
        if self.parked:
            self.weights = [weight.clone() for weight in self.weights]
            self.parked = False

    def reset(self, read: Callable[..., TextClassifier], dropout: float | None, seed: int) -> None:
        self.unpark()
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
    return [(module, module.p) for module in net.modules() if isinstance(module, CheapDropout)]
