"""LoRA: low-rank factors beside the weight matrices, which train in their place."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_bge.errors import ConfigError
from lightning_bge.models.memory_saving.freezing import depths_of_parameters, find_layers
from lightning_bge.runtime.model_config import is_head

ADAPTER = "default"  # PEFT's own name for the only adapter


@dataclass(frozen=True)
class LoRAConfig:
    """Factors that train beside each weight matrix of the layers (LoRA, Hu et al., arXiv:2106.09685), by PEFT.

    The head trains as well, all else is frozen. The factors are merged into plain weights at export. The best learning
    rate is usually higher than without LoRA.

    Attributes:
        r: rank of the factors; null: no LoRA.
        alpha: the product of the factors is multiplied by alpha / r; null: 2 x r.
        target_modules: names of the linear layers that get factors: query, value...; null: all of the encoder's layers.
    """

    r: int | None = None
    alpha: float | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r is not None and self.r < 1:
            raise ConfigError(f"model.lora.r: expected 1 or more, or null, got {self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"model.lora.alpha: expected more than 0, or null, got {self.alpha}")
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("model.lora.target_modules: expected names of linear layers, or null for all, got none")


def add_lora(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Add factors to a freshly loaded model, in place, and freeze all but these and the head.

    Args:
        model: in train mode; the classes of its layers and the keys of what gets no factors stay the same.
        config: with a rank.
        seed: what the factors are drawn from.

    Raises:
        ConfigError: the architecture has no such layers, or PEFT is not installed.
    """
    assert config.r is not None
    if find_spec("peft") is None:
        raise ConfigError(f"model.lora.r is {config.r}, but peft is not installed: pip install 'lightning-bge[lora]'")
    from peft import LoraConfig, inject_adapter_in_model  # takes a second

    _, layers = find_layers(model)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=2 * config.r if config.alpha is None else config.alpha,
        target_modules=_targets(layers, config.target_modules),
    )
    # on the CPU, where `fork_rng` restores the generator, and where numbers do not depend on the device
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, layers)
    for module in layers.modules():
        if hasattr(module, "lora_A"):
            # else the input is cast to fp32 under autocast, and another copy of it is kept for the backward pass
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    model.train()
    depths = depths_of_parameters(model)
    for name, parameter in model.named_parameters():
        if depths[name] <= len(layers) and ".lora_" not in name:
            parameter.requires_grad = False


def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state as it would be without LoRA: the factors' product added to the weights, original keys.

    The model itself does not change, so that training can continue. Without LoRA this is its `state_dict`.
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not is_head(name):
            weight = state[f"{name}.base_layer.weight"]
            state[f"{name}.base_layer.weight"] = weight + module.get_delta_weight(ADAPTER).to(weight.dtype)
    own = {key: value for key, value in state.items() if is_head(key)}  # a head has no factors, whatever its names
    rest = {key: value for key, value in state.items() if key not in own and ".lora_" not in key}
    return {key.replace(".base_layer.", "."): value for key, value in rest.items()} | own


def _targets(layers: nn.ModuleList, wanted: list[str] | None) -> list[str]:
    """Names, within the layers, of the linear layers that are wanted: by the end of their names."""
    linear = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    if wanted is None:
        return linear
    for target in wanted:
        if not any(name.endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(f"model.lora.target_modules: expected some of {names}, or null, got {target}")
    return [name for name in linear if name.endswith(tuple(f".{target}" for target in wanted))]
