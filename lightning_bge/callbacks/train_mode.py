"""Train mode that is really on."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.errors import ConfigError

log = logging.getLogger(__name__)


class TrainMode(Callback):
    """Puts every module into train mode when `fit` starts, and logs which ones were not.

    `from_pretrained` returns a model in eval mode, and Lightning (since 2.2) leaves modules in the mode they are in: a
    fine-tuned transformer then trains without dropout, after a warning that does not mention dropout.

    Args:
        keep: names of sub-modules to leave alone, with all that is below them, such as a frozen encoder that is to
            stay in eval mode.

    Raises:
        ConfigError: at the start of `fit`, where the module has no such sub-module.
    """

    def __init__(self, keep: tuple[str, ...] = ()) -> None:
        self.keep = keep
        self.switched: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the modules, and log once how many there were."""
        self.switched = []
        unknown = sorted(set(self.keep) - {name for name, _ in pl_module.named_modules()})
        if unknown:
            raise ConfigError(f"TrainMode.keep: {type(pl_module).__name__} has no sub-module {', '.join(unknown)}")
        for name, module in pl_module.named_modules():
            kept = any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.keep)
            if not module.training and not kept:
                module.training = True
                self.switched.append(name or type(module).__name__)
        if self.switched:
            log.warning("TrainMode: %d modules were in eval mode (first: %s)", len(self.switched), self.switched[0])
