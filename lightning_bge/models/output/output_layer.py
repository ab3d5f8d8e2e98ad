"""The linear layer of a head that gives the logits, found by what it does, as architectures name it differently."""

import torch
from torch import Tensor, nn

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.types import MicroBatch


def find_output_layer(net: TextClassifier, micro: MicroBatch) -> nn.Linear:
    """The layer whose output is the logits: a change of its output is the same change of the logits.

    Args:
        net: the encoder with its head; it does not change.
        micro: what it is tried on, on its device; any text does.

    Raises:
        ConfigError: there is no such layer, or its weights are those of another layer too.
    """
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            logits = net(micro)
            layers = [layer for layer in net.model.modules() if isinstance(layer, nn.Linear)]
            wide = [layer for layer in layers if layer.out_features == logits.shape[-1]]
            found = [layer for layer in wide if _gives_logits(net, layer, micro, logits)]
    finally:
        net.train(training)
    kind = net.model.config.model_type
    if len(found) != 1:
        raise ConfigError(
            f"hpo.calibration: a temperature can't be built into a {kind}, as its logits are not the output of one "
            "linear layer. Set hpo.calibration to null, or use another model"
        )
    own = [parameter for _, parameter in net.model.named_parameters(remove_duplicate=False)]
    if any(sum(one is parameter for one in own) > 1 for parameter in found[0].parameters()):
        raise ConfigError(
            f"hpo.calibration: a temperature can't be built into this {kind}, as its last layer shares its weights "
            "with another one. Set hpo.calibration to null, or use another model"
        )
    return found[0]


@torch.no_grad()
def divide_logits(layer: nn.Linear, temperature: float) -> None:
    """Divide what the layer gives by the temperature, in its weights."""
    for parameter in layer.parameters():
        parameter.div_(temperature)


def _gives_logits(net: TextClassifier, layer: nn.Linear, micro: MicroBatch, logits: Tensor) -> bool:
    def change(values: Tensor) -> Tensor:
        return values * 0.5 + 1  # not a factor alone: zeros would stay zeros, whichever layer it is

    hook = layer.register_forward_hook(lambda module, args, output: change(output))
    try:
        return torch.allclose(net(micro), change(logits), rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
