"""What this package needs of transformers that has no public name: one function each, with its reason."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

RECOMPUTE = partial(checkpoint, use_reentrant=False)


def attention_implementation(model: Any) -> str | None:
    """`eager`, `sdpa`, ... of a transformers model; None: it does not state one.

    `set_attn_implementation` is public, but nothing public reads what was set.
    """
    return getattr(model.config, "_attn_implementation", None)


def set_recomputed(layer: GradientCheckpointingLayer, on: bool) -> None:
    """Compute a layer again in the backward pass, or keep its activations.

    The public `gradient_checkpointing_enable` of a model would also make the embeddings' output need a gradient, so
    that frozen layers would keep activations.
    """
    layer._gradient_checkpointing_func = RECOMPUTE
    layer.gradient_checkpointing = on
