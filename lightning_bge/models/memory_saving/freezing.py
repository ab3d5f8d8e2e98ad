"""Which layers of an encoder train: what is frozen has no gradient and no optimizer state."""

from torch import nn
from transformers import PreTrainedModel

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.model_config import is_head


def freeze_layers(model: PreTrainedModel, frozen_layers: int) -> None:
    """Freeze the embeddings and the lowest layers, in place.

    No activation below the first layer that trains is kept for the backward pass.

    Args:
        model: a model whose parameters need gradients as after loading; this takes some from them.
        frozen_layers: number of layers; 0: the embeddings alone.

    Raises:
        ConfigError: the architecture has no such layers, or not so many.
    """
    _, layers = find_layers(model)
    if frozen_layers > len(layers):
        raise ConfigError(
            f"model.frozen_layers: expected at most {len(layers)}, the number of this model's layers, "
            f"got {frozen_layers}"
        )
    depths = depths_of_parameters(model)
    for name, parameter in model.named_parameters():
        if depths[name] <= frozen_layers:
            parameter.requires_grad = False


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The encoder's layers with the name of their list: the longest list of modules of one class that is not in a head.

    Raises:
        ConfigError: there is no such list.
    """
    lists = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and not is_head(name)
    ]
    found = [(name, part) for name, part in lists if len({type(layer) for layer in part}) == 1]
    if not found:
        raise ConfigError(
            f"model.frozen_layers and model.lora need an encoder with a list of layers, and no list is found in a "
            f"{model.config.model_type}: set frozen_layers and lora.r to null"
        )
    return max(found, key=lambda pair: len(pair[1]))


def depths_of_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Name of each parameter -> 0 for embeddings, n for the n-th layer, above all of these for the head.

    What layers share, such as DeBERTa's table of relative positions, counts as embeddings.
    """
    path, layers = find_layers(model)
    encoder = path.rpartition(".")[0]
    has_own = model.get_submodule(encoder) is not model.base_model

    def depth(name: str) -> int:
        if name.startswith(f"{path}."):
            return 1 + int(name.removeprefix(f"{path}.").split(".")[0])
        if is_head(name):
            return len(layers) + 1
        below = "embeddings" in name or (has_own and name.startswith(f"{encoder}."))
        return 0 if below else len(layers) + 1

    return {name: depth(name) for name, _ in model.named_parameters()}
