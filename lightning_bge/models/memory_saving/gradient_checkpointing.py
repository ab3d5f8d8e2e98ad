"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.transformers import set_recomputed


def supports_gradient_checkpointing(net: nn.Module) -> bool:
    """Whether transformers can recompute the layers of this architecture."""
    return bool(_layers(net))


def uses_gradient_checkpointing(net: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(layer.gradient_checkpointing for layer in _layers(net))


def set_gradient_checkpointing(net: nn.Module, on: bool) -> None:
    """Keep each layer's input alone, and compute the layer again in the backward pass; or keep all activations.

    Costs one more forward pass (Chen et al., arXiv:1604.06174); gradients stay the same, with dropout as well. It may
    be switched between any two training steps.

    A layer that torch.compile compiles is recomputed as part of its graph. Where the graph breaks within the layer, as
    it does around packed attention on a CPU, torch runs the whole layer eager as long as this is on.

    Args:
        net: a module with transformers' layers in it.
        on: whether to recompute.

    Raises:
        ConfigError: it is to be on, and the architecture does not support it.
    """
    layers = _layers(net)
    if on and not layers:
        raise ConfigError(
            "model.gradient_checkpointing: transformers can't recompute the layers of this architecture; "
            "set it to false"
        )
    for layer in layers:
        set_recomputed(layer, on)


def _layers(net: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in net.modules() if isinstance(module, GradientCheckpointingLayer)]
