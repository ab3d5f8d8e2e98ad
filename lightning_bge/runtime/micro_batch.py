"""The size of a micro-batch: what makes the batches knows the one in effect; all others ask for it and set it there."""

from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer


class SupportsMicroBatchSize(Protocol):
    """What a data module, or a LightningModule, offers to have its micro-batches sized: then it is a batch source.

    The size counts what the batch source likes, such as real tokens or rows of a micro-batch. Three more attributes
    are optional:

    - `micro_batch_size_step: int`, the smallest size, of which sizes are multiples. Missing: 1.
    - `auto_micro_batch_size: bool`, False where the user has set a number: no size is searched then. Missing: True.
    - `micro_batch_size_key: dict`, what of the data the memory of a step depends on, besides the size, as plain data.

    Attributes:
        micro_batch_size: the size in effect.
    """

    micro_batch_size: int

    def set_micro_batch_size(self, size: int) -> None:
        """Make micro-batches of that size from now on."""

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> Any:
        """A synthetic batch of that size, on the host, in which everything is as long as it can get.

        Only `MicroBatchFinder` calls it.

        Args:
            micro_batch_size: a multiple of `micro_batch_size_step`.
            train: for the training step; else what is validated with at that size, which may be larger.
        """


def batch_source(trainer: Trainer, module: LightningModule) -> SupportsMicroBatchSize | None:
    """The trainer's data module, or else the module, whose micro-batch size can be set; None where there is none."""
    source: Any
    for source in (getattr(trainer, "datamodule", None), module):
        if hasattr(source, "micro_batch_size") and callable(getattr(source, "set_micro_batch_size", None)):
            return source
    return None
