"""Small encoders with gradient checkpointing, frozen layers or LoRA, and what a forward pass of them keeps."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.heads import PACKED_HEADS
from lightning_bge.models.memory_saving.freezing import freeze_layers
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig, add_lora
from tests.helpers.small_models import cut_batch, micro_batch, random_sequences, small_model

KINDS = ["bert", "xlm-roberta", "modernbert", "deberta-v2"]
LORA = LoRAConfig(r=3)
# bytes that one layer passes to the next for sequences of 9 and 5 tokens; DeBERTa's are padded
HIDDEN = {kind: 4 * 32 * (9 + (5 if kind in PACKED_HEADS else 9)) for kind in KINDS}


def make_net(
    kind: str,
    *,
    gradient_checkpointing: bool = False,
    frozen_layers: int | None = None,
    lora: LoRAConfig | None = None,
    dropout: float = 0.0,
    **changes: Any,
) -> TextClassifier:
    """A small encoder in train mode; `changes` go to its configuration."""
    net = TextClassifier(small_model(kind, dropout=dropout, **changes)).train()
    if lora is not None:
        add_lora(net.model, lora, seed=1)
    if frozen_layers is not None:
        freeze_layers(net.model, frozen_layers)
    set_gradient_checkpointing(net, gradient_checkpointing)
    return net


def gradients(net: TextClassifier, bf16: bool = False) -> dict[str, Tensor]:
    """Of the parameters that got one; random numbers are the same each time."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for micro in cut_batch(random_sequences((9, 7, 5, 5, 3, 2)), torch.zeros(6), 2).micro:
            net(micro).float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


class Kept:
    def __init__(self, where: str, tensor: Tensor) -> None:
        self.where, self.tensor = where, tensor


def saved_bytes(net: TextClassifier) -> dict[str, int]:
    """Embeddings, each layer, and what follows -> bytes of activations that are kept from there after a forward."""
    base = net.model.base_model
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    stack = ["head"]
    parts = [("embeddings", base.embeddings), *((str(number), layer) for number, layer in enumerate(layers))]
    hooks = []
    for name, part in parts:
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(part.register_forward_hook(lambda *_: stack.pop() and None))

    held: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(stack[-1], tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        logits = net(micro_batch(random_sequences((9, 5))))
    for hook in hooks:
        hook.remove()
    found = {name: 0 for name in [*(name for name, _ in parts), "head"]}
    for kept in held:
        if not isinstance(kept.tensor, nn.Parameter):
            found[kept.where] += kept.tensor.untyped_storage().nbytes()
    assert logits.requires_grad
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two states have the same keys, and equal tensors bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
