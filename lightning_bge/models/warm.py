"""One live encoder for many trials: reset in place instead of loaded anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_bge.models.bert import BERT_LIKE
from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.savers import SaversConfig, switch_savers


class WarmEncoder:
    """Loads as `load_classifier` does, but hands out one and the same encoder, with its first weights copied back.

    Equal to a fresh load bit for bit; what was compiled stays so, and the weights stay on the device where they are.
    What was handed out before must no longer be in use. Another model, head, attention or LoRA is loaded from disk;
    another seed too, for its head, and for architectures other than BERT's another dropout, as they are built by it.
    Frozen layers and activation checkpointing are set in place.

    Attributes:
        loads: how many times a model was read from disk.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._net: TextClassifier | None = None
        self._key: tuple[Any, ...] = ()
        self._seed = 0
        self._dropout: float | None = None
        self._parameters: list[Tensor] = []  # buffers are not listed: these encoders' are constants
        self._trained: list[bool] = []  # whether each one needs a gradient where no layers are frozen
        self._weights: list[Tensor] = []  # the parameters' first values
        self._rates: list[tuple[CheapDropout, float]] | None = None  # the checkpoint's, where they can be set in place

    def load(
        self,
        name_or_path: str,
        num_outputs: int,
        *,
        dropout: float | None = None,
        seed: int = 42,
        savers: SaversConfig = SaversConfig(),  # noqa: B008 - frozen
        **options: Any,
    ) -> TextClassifier:
        """See `load_classifier`, whose arguments these are."""
        options["savers"] = replace(savers, activation_checkpointing=False, frozen_layers=None)
        key = (name_or_path, num_outputs, tuple(sorted(options.items())))
        if key != self._key or (self._rates is None and dropout != self._dropout):
            self._net = None  # before the next one is there
        if self._net is None:
            self._key, self._seed, self._dropout = key, seed, dropout
            self._net = self._read(name_or_path, num_outputs, seed=seed, **options)
            self._rates = _rates(self._net)
            if self._rates is None and dropout is not None:
                self._net = self._read(name_or_path, num_outputs, dropout=dropout, seed=seed, **options)
            self._parameters = list(self._net.parameters())
            self._trained = [parameter.requires_grad for parameter in self._parameters]
            self._weights = [parameter.detach().clone() for parameter in self._parameters]
        elif seed != self._seed:
            self._seed = seed
            fresh = self._read(name_or_path, num_outputs, dropout=dropout, seed=seed, **options)
            self._weights = [parameter.detach() for parameter in fresh.parameters()]
        self._reset(self._net, dropout)
        switch_savers(self._net, savers)
        return self._net

    def let_go(self) -> None:
        """Hold nothing; the next load reads from disk."""
        self._net, self._key, self._rates = None, (), None
        self._parameters, self._trained, self._weights = [], [], []

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held: parameters, buffers, and the parameters' first values."""
        held = [] if self._net is None else [*self._net.parameters(), *self._net.buffers(), *self._weights]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())

    def _read(self, *args: Any, **options: Any) -> TextClassifier:
        self.loads += 1
        return load_classifier(*args, **options)

    def _reset(self, net: TextClassifier, dropout: float | None) -> None:
        device = self._parameters[0].device
        if self._weights[0].device != device:
            self._weights = [weight.to(device) for weight in self._weights]
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._weights)
        for parameter, trained in zip(self._parameters, self._trained, strict=True):
            parameter.grad, parameter.requires_grad = None, trained
        net.train()
        for module, rate in self._rates or ():
            module.p = rate if dropout is None else dropout


def _rates(net: TextClassifier) -> list[tuple[CheapDropout, float]] | None:
    """All dropout modules with their rates; None: the architecture holds rates elsewhere too."""
    if net.model.config.model_type not in BERT_LIKE:
        return None
    return [(module, module.p) for module in net.modules() if isinstance(module, CheapDropout)]
