"""What a module does when memory runs out: smaller micro-batches, then gradient checkpointing, then an error."""

import logging
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import nn

from lightning_bge.models.memory_saving.gradient_checkpointing import (
    set_gradient_checkpointing,
    supports_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lightning_bge.runtime.oom import OutOfMemory, OutOfMemoryError, clean_up, find_oom
from lightning_bge.types import Batch, MicroBatch

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEDIES = (
    "lower data.max_length or data.windows.max_windows, take a smaller model, free the device of other processes, or "
    "save memory by model.lora.r, model.frozen_layers or model.optimizer.name: adamw_8bit"
)


class Sized(Protocol):
    """Where the size of training micro-batches is known and set: see `batch_source`."""

    micro_batch_size: int

    def set_micro_batch_size(self, size: int) -> None:
        """Make micro-batches of that size from now on."""


class _Unsized:
    """Used as the batch source if none is known."""

    micro_batch_size = sys.maxsize

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size


class OOMRetry:
    """Repeats a computation that ran out of memory with less memory: the same effective batch, from the same state.

    First the micro-batches are halved, from the one on that did not fit. The batch source learns the new size, so that
    it makes smaller ones; those that it made before are split here. A single row that does not fit makes training
    switch gradient checkpointing on. Then nothing is left, and an error says what to change.

    Attributes:
        eval_size: the most tokens of a micro-batch without gradients, once one did not fit; None before.
        gradient_checkpointing: whether gradient checkpointing was switched on here.
        records: all failures of this run, oldest first.
        where: what is being done: setup, forward, backward, optimizer, validation, or data between the steps.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all failures: batches are taken as they come until the next one."""
        self.eval_size: int | None = None
        self.gradient_checkpointing = False
        self.records: list[OutOfMemory] = []
        self.where = "setup"
        self._micro: MicroBatch | None = None
        self._lowered = False
        self._unsized = _Unsized()

    def at(self, where: str, micro: MicroBatch | None = None) -> None:
        """Note what is being computed."""
        self.where, self._micro = where, micro

    def run(
        self, compute: Callable[[Batch], T], batch: Batch, net: nn.Module, *, source: Sized | None, training: bool
    ) -> T:
        """`compute(batch)`, repeated with less memory as long as it runs out of it.

        Args:
            compute: has to start from the beginning each time, random numbers included, and to call `at` for each
                micro-batch. When it fails it may leave gradients behind, which are dropped, and nothing else.
            batch: an effective batch.
            net: whose gradients these are.
            source: what makes the batches; None: it is not known, or its size can't be set.
            training: whether gradients are computed.

        Raises:
            OutOfMemoryError: nothing is left to try. Errors that are not about memory are raised unchanged.
        """
        sized = source or self._unsized
        while True:
            size = self.eval_size
            if training:
                size = sized.micro_batch_size if self._lowered else None
            try:
                found = compute(batch.split(size))
                self.at("data")
                return found
            except Exception as error:
                failed = find_oom(error, self.where)
                if failed is None or failed.kind != "device":
                    raise
            # Only here: as long as the error was handled it held every tensor of the step.
            failing, self._micro = self._micro, None
            self.records.append(failed)
            if training:
                net.zero_grad(set_to_none=True)
            clean_up()
            self._save_memory(failed, failing, net, sized if training else None)

    def _save_memory(
        self, failed: OutOfMemory, failing: MicroBatch | None, net: nn.Module, sized: Sized | None
    ) -> None:
        """Take the next measure; `sized` is None in evaluation."""
        if failing is not None and len(failing.row_lengths) > 1:
            size = max(sum(failing.lengths) // 2, max(failing.row_lengths))
            if sized is None:
                self.eval_size = size
            else:
                self._lowered = True
                sized.set_micro_batch_size(min(size, sized.micro_batch_size))
            log.warning("%s: continuing with micro-batches of at most %d tokens", failed, size)
        elif sized is not None and supports_gradient_checkpointing(net) and not uses_gradient_checkpointing(net):
            set_gradient_checkpointing(net, True)
            self.gradient_checkpointing = True
            log.warning("%s for one row: gradient checkpointing is on from now on", failed)
        else:
            tokens = "a micro-batch" if failing is None else f"one row of {sum(failing.lengths)} tokens"
            raise OutOfMemoryError(f"{tokens} does not fit into memory: {failed}. To fix it, {REMEDIES}", failed)

    def step(self, update: Callable[[], None], has_changed: Callable[[], bool]) -> None:
        """`update()`, the optimizer's step, and once more where memory ran out before it changed a weight.

        Args:
            update: clips the gradients and steps.
            has_changed: whether a weight may have been updated.

        Raises:
            OutOfMemoryError: some weights may be updated and others not, or it did not fit the second time either.
        """
        self.at("optimizer")
        for last in (False, True):
            try:
                update()
            except Exception as error:
                failed = find_oom(error, "optimizer")
                if failed is None:
                    raise
            else:
                self.at("data")
                return
            self.records.append(failed)
            clean_up()
            if has_changed():
                raise OutOfMemoryError(
                    f"{failed}; some weights may be updated and others not: continue from the last checkpoint. "
                    f"To fix it, {REMEDIES}",
                    failed,
                )
            if last:
                raise OutOfMemoryError(f"{failed}. To fix it, {REMEDIES}", failed)
            log.warning("%s before any weight has changed: the step is repeated", failed)
