"""What a step does when memory runs out: smaller micro-batches, then activation checkpointing, then an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.peft_and_freezing import recomputes, set_activation_checkpointing
from lightning_bge.runtime.memory import OutOfMemory, OutOfMemoryError, find_oom, give_way, release
from lightning_bge.types import Batch, MicroBatch

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEDIES = (
    "lower data.max_length, take a smaller model, free the device of other processes, or save memory by "
    "model.savers (lora_rank, frozen_layers) or model.optimizer.name: adamw_8bit"
)


class OOMRetry:
    """Repeats what ran out of memory with less of it: the same effective batch, from the same state.

    First the micro-batches are halved, from the one on that did not fit. A single sequence that does not fit makes
    training switch activation checkpointing on. Then nothing is left.

    Attributes:
        limit: the most tokens of a training micro-batch from now on; None: as the data module cuts them.
        eval_limit: likewise without gradients.
        checkpointing: whether activation checkpointing was switched on here.
        active: False lets errors out: a callback that tries out batches wants to know what does not fit.
        records: all failures of this run, oldest first.
        where: what is being done: setup, forward, backward, optimizer, validation, or data between the steps.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.eval_limit: int | None = None
        self.checkpointing = False
        self.active = True
        self.records: list[OutOfMemory] = []
        self.where = "setup"
        self._micro: MicroBatch | None = None

    def at(self, where: str, micro: MicroBatch | None = None) -> None:
        """Note what is being computed."""
        self.where, self._micro = where, micro

    def run(self, compute: Callable[[Batch], T], batch: Batch, net: TextClassifier, training: bool) -> T:
        """`compute(batch)`, and again with less memory as long as it runs out of it.

        Args:
            compute: has to begin anew each time, random numbers included, and to call `at` for each micro-batch. What
                it leaves behind when it fails may be gradients, which are dropped, and nothing else.
            batch: an effective batch.
            net: whose gradients these are.
            training: whether gradients are computed.

        Raises:
            OutOfMemoryError: nothing is left to try. Other errors than those of memory come out as they are.
        """
        while True:
            try:
                limit = self.limit if training else self.eval_limit
                found = compute(batch.split(limit if self.active else None))
                self.at("data")
                return found
            except Exception as error:
                failed = find_oom(error, self.where)
                if failed is None or failed.kind != "device" or not self.active:
                    raise
            # Only here: as long as the error was handled it held every tensor of the step.
            failing, self._micro = self._micro, None
            self.records.append(failed)
            if training:
                net.zero_grad(set_to_none=True)
            give_way()
            release()
            self._save_memory(failed, failing, net, training)

    def _save_memory(
        self, failed: OutOfMemory, failing: MicroBatch | None, net: TextClassifier, training: bool
    ) -> None:
        if failing is not None and len(failing.lengths) > 1:
            limit = max(sum(failing.lengths) // 2, failing.lengths[0])
            if training:
                self.limit = limit
            else:
                self.eval_limit = limit
            log.warning("%s: going on with micro-batches of at most %d tokens", failed, limit)
        elif training and not recomputes(net) and set_activation_checkpointing(net, True):
            self.checkpointing = True
            log.warning("%s for one sequence: activation checkpointing is on from now on", failed)
        else:
            tokens = "a micro-batch" if failing is None else f"one sequence of {sum(failing.lengths)} tokens"
            raise OutOfMemoryError(f"{tokens} does not fit into memory: {failed}. To mend it, {REMEDIES}", failed)
