"""Loss scaling for training in fp16 (`trainer.precision: 16-mixed`), whose smallest numbers are larger than gradients.

Lightning multiplies the loss of each micro-batch by the scale of its precision plugin's `torch.amp.GradScaler`
(Micikevicius et al., arXiv:1710.03740). Gradients are unscaled once, when all micro-batches and ranks are added up.
"""

import logging

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_bge.errors import ConfigError, UserError
from lightning_bge.runtime.compat.torch import takes_found_inf

log = logging.getLogger(__name__)

PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")
MIN_SCALE = 1.0  # DeepSpeed's `min_loss_scale`: at this scale no gradient that fp32 could use is too large for fp16


def check_precision(trainer: Trainer) -> None:
    """Refuse a precision in which training would go wrong.

    Raises:
        ConfigError: it has no fp32 weights, or fp16 products without loss scaling.
    """
    precision = trainer.precision
    if precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"trainer.precision: expected {', '.join(PRECISIONS)} or auto, got {precision}: without fp32 weights "
            "updates that are much smaller than their weights are rounded away, and it has not been measured whether "
            f"that pays. Set {precision.replace('true', 'mixed')}"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision: expected {', '.join(PRECISIONS)} or auto, got {precision}")
    if precision == "16-mixed" and ((scaler := loss_scaler(trainer)) is None or not scaler.is_enabled()):
        raise ConfigError(
            "trainer.precision: expected loss scaling with 16-mixed, got a precision plugin without an enabled "
            "GradScaler: small gradients would become 0. Leave trainer.plugins out, or give the plugin a GradScaler"
        )


def loss_scaler(trainer: Trainer) -> GradScaler | None:
    """What scales the loss; None: the precision needs no scaling."""
    return getattr(trainer.precision_plugin, "scaler", None)


def steps_made(optimizer: Optimizer) -> Tensor:
    """The steps that an optimizer has made, by its own count, without those that were skipped; 0-d float32.

    It is on the device of the counts, so that nothing waits for the device.
    """
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    if not counts:
        return torch.zeros(())
    return torch.stack([torch.as_tensor(count, dtype=torch.float32) for count in counts]).max()


class LossScaling:
    """What a module does about its loss scale beside `GradScaler`: says which steps were skipped, and ends a lost run.

    `GradScaler` skips a step whose gradients are not finite: weights and the optimizer's state stay as they are, and
    the scale is halved. It says so nowhere, and goes on doing so for ever where the loss itself is not finite.

    Args:
        scaler: the precision plugin's.
        optimizer: the one whose steps are skipped.
        device: of the module.
        global_step: of the trainer now.

    Raises:
        ConfigError: the optimizer would have its gradients unscaled twice.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer, device: torch.device, global_step: int) -> None:
        if not takes_found_inf(optimizer):
            raise ConfigError(
                f"trainer.precision: 16-mixed needs an optimizer whose step takes `found_inf`, such as AdamW with "
                f"fused=True, got {type(optimizer).__name__}. Set 32-true, or return such an optimizer from "
                "configure_optimizers"
            )
        self.scaler = scaler
        scaler.scale(torch.zeros((), device=device))  # makes its state, also on a rank whose first shard is empty
        self._made, self._seen = float(steps_made(optimizer)), global_step

    def check(self) -> float:
        """The scale; this waits for the device.

        Raises:
            UserError: it is below `MIN_SCALE`.
        """
        scale = self.scaler.get_scale()
        if scale < MIN_SCALE:
            raise UserError(
                f"trainer.precision: with 16-mixed the loss scale fell to {scale:g}, as gradients are not finite at "
                "any scale: the loss itself is infinite or NaN. Lower model.optimizer.lr, check the labels of a "
                "regression, or set trainer.precision to 32-true"
            )
        return scale

    def end_epoch(self, optimizer: Optimizer, global_step: int) -> dict[str, float]:
        """Log the steps that were skipped since the last call -> `train_loss_scale`, `train_skipped_steps`.

        Args:
            optimizer: as at the start; it is not kept, as it holds much memory.
            global_step: of the trainer now; it counts skipped steps too.

        Raises:
            UserError: see `check`.
        """
        scale, made = self.check(), float(steps_made(optimizer))
        steps, skipped = global_step - self._seen, global_step - self._seen - int(made - self._made)
        if skipped:
            log.info(
                "16-mixed: %d of %d steps were skipped, as gradients were too large for fp16; the loss scale is now %g",
                *(skipped, steps, scale),
            )
        self._seen, self._made = global_step, made
        return {"train_loss_scale": scale, "train_skipped_steps": float(skipped)}
