"""What saves memory in training: recomputed activations, frozen layers, and LoRA's factors in place of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_bge.errors import ConfigError

if TYPE_CHECKING:
    from lightning_bge.models.encoder import TextClassifier

ADAPTER = "default"  # peft's own name for the only adapter
RECOMPUTE = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class SaversConfig:
    """What is given up for memory, all off by default.

    Attributes:
        activation_checkpointing: keep each layer's input alone and compute the layer again in the backward pass (Chen
            et al., arXiv:1604.06174). Costs one more forward pass; gradients stay the same, dropout included.
        frozen_layers: null: everything trains; 0: all but the embeddings; n: all but the embeddings and the n lowest
            layers. What is frozen has no gradient and no optimizer state, and nothing below the first layer that trains
            is kept for the backward pass.
        lora_rank: train two factors of this rank beside each weight matrix of the layers, and the head; all else is
            frozen (LoRA, Hu et al., arXiv:2106.09685). Merged into plain weights at export. null: no LoRA. Search its
            learning rate anew: the best one is usually higher than without.
        lora_alpha: the factors' product counts lora_alpha / lora_rank times; null: 2 x lora_rank.
        lora_targets: names of the linear layers that get factors: query, value...; null: all in the encoder's layers.
    """

    activation_checkpointing: bool = False
    frozen_layers: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.frozen_layers is not None and self.frozen_layers < 0:
            raise ConfigError(f"model.savers.frozen_layers: expected 0 or more, or null, got {self.frozen_layers}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigError(f"model.savers.lora_rank: expected 1 or more, or null, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ConfigError(f"model.savers.lora_alpha: expected more than 0, or null, got {self.lora_alpha}")
        if self.lora_targets is not None and not self.lora_targets:
            raise ConfigError("model.savers.lora_targets: expected names of linear layers, or null for all, got none")
        if self.lora_rank is not None and self.frozen_layers is not None:
            raise ConfigError(
                f"model.savers: lora_rank is {self.lora_rank}, which freezes all layers, and frozen_layers is "
                f"{self.frozen_layers}: set one of them to null"
            )


def apply_savers(net: TextClassifier, config: SaversConfig, seed: int) -> None:
    """Put the savers into a freshly loaded encoder, in place.

    Args:
        net: the encoder; its layers' classes and the keys of what gets no factors stay as they are.
        config: which ones.
        seed: what LoRA's factors are drawn from.

    Raises:
        ConfigError: the architecture has no such layers, or peft is not installed.
    """
    if config.lora_rank is not None:
        _add_lora(net, config, config.lora_rank, seed)
    switch_savers(net, config)


def switch_savers(net: TextClassifier, config: SaversConfig) -> None:
    """Set those savers that change no parameter: frozen layers and activation checkpointing.

    Args:
        net: an encoder whose parameters need gradients as after loading; this takes some from them.
        config: LoRA in it must be in the encoder already.

    Raises:
        ConfigError: the architecture has no such layers, or not so many.
    """
    if config.frozen_layers is not None:
        _, layers = _layers(net)
        if config.frozen_layers > len(layers):
            raise ConfigError(
                f"model.savers.frozen_layers: expected at most {len(layers)}, as this model has so many layers, "
                f"got {config.frozen_layers}"
            )
        depths = _depths(net)
        for name, parameter in net.named_parameters():
            if depths[name] <= config.frozen_layers:
                parameter.requires_grad = False
    if not set_activation_checkpointing(net, config.activation_checkpointing) and config.activation_checkpointing:
        raise ConfigError(
            f"model.savers.activation_checkpointing is true, but transformers can't recompute the layers of a "
            f"{net.model.config.model_type}: set it to false"
        )


def set_activation_checkpointing(net: nn.Module, on: bool) -> bool:
    """Recompute the layers in the backward pass, or keep their activations; allowed between any two training steps.

    Done through the flag of transformers' layers. Its `gradient_checkpointing_enable` would also make the embeddings'
    output need a gradient, so that frozen layers would keep activations.

    A layer that torch.compile compiles is recomputed as part of its graph. Where the graph breaks within the layer, as
    it does around packed attention on a CPU, torch runs the whole layer eager as long as this is on.

    Args:
        net: a module with transformers' layers in it.
        on: whether to recompute.

    Returns:
        Whether the architecture can be recomputed; if not, nothing is changed.
    """
    layers = [module for module in net.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer._gradient_checkpointing_func = RECOMPUTE
        layer.gradient_checkpointing = on
    return bool(layers)


def recomputes(net: nn.Module) -> bool:
    """Whether activation checkpointing is on."""
    return any(layer.gradient_checkpointing for layer in net.modules() if isinstance(layer, GradientCheckpointingLayer))


def plain_weights(net: TextClassifier) -> dict[str, Tensor]:
    """The state of the transformers model as it would be without LoRA: factors multiplied and added, keys restored.

    The model stays as it is, so that training can go on. Without LoRA this is its `state_dict`.
    """
    state = net.model.state_dict()
    for name, module in net.model.named_modules():
        if hasattr(module, "lora_A"):
            weight = state[f"{name}.base_layer.weight"]
            state[f"{name}.base_layer.weight"] = weight + module.get_delta_weight(ADAPTER).to(weight.dtype)
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def _add_lora(net: TextClassifier, config: SaversConfig, rank: int, seed: int) -> None:
    if find_spec("peft") is None:
        raise ConfigError(
            f"model.savers.lora_rank is {rank}, but peft is not installed: pip install 'lightning-bge[lora]'"
        )
    from peft import LoraConfig, inject_adapter_in_model  # takes a second

    _, layers = _layers(net)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=_targets(layers, config.lora_targets),
    )
    # on the CPU, where `fork_rng` puts the generator back, and where numbers do not depend on the device
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, layers)
    for module in layers.modules():
        if hasattr(module, "lora_A"):
            # else the input is cast to fp32 under autocast, and another copy of it is kept for the backward pass
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    net.train()
    depths = _depths(net)
    for name, parameter in net.named_parameters():
        if depths[name] <= len(layers) and ".lora_" not in name:
            parameter.requires_grad = False


def _targets(layers: nn.ModuleList, wanted: list[str] | None) -> list[str]:
    """Names, within the layers, of the linear layers that are wanted: by their last name or more of it."""
    linear = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    if wanted is None:
        return linear
    for target in wanted:
        if not any(name.endswith(f".{target}") for name in linear):
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(f"model.savers.lora_targets: expected some of {', '.join(names)}, or null, got {target}")
    return [name for name in linear if name.endswith(tuple(f".{target}" for target in wanted))]


def _layers(net: TextClassifier) -> tuple[str, nn.ModuleList]:
    """The encoder's layers, and their name: the longest list of modules of one class."""
    lists = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    found = [(name, part) for name, part in lists if len({type(layer) for layer in part}) == 1]
    if not found:
        raise ConfigError(
            f"model.savers: no layers are found in a {net.model.config.model_type}, which frozen_layers and lora_rank "
            "need: set them to null"
        )
    return max(found, key=lambda pair: len(pair[1]))


def _depths(net: TextClassifier) -> dict[str, int]:
    """Name of each parameter -> 0 for embeddings, n for the n-th layer, above all of these for the head.

    What layers share, such as DeBERTa's table of relative positions, counts as embeddings.
    """
    path, layers = _layers(net)
    encoder = path.rpartition(".")[0]
    has_own = net.get_submodule(encoder) is not net.model.base_model

    def depth(name: str) -> int:
        if name.startswith(f"{path}."):
            return 1 + int(name.removeprefix(f"{path}.").split(".")[0])
        below = "embeddings" in name or (has_own and name.startswith(f"{encoder}."))
        return 0 if below else len(layers) + 1

    return {name: depth(name) for name, _ in net.named_parameters()}
