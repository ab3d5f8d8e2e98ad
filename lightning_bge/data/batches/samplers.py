"""The order of rows: random effective batches for training, micro-batches sorted by length for evaluation."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lightning_bge.data.batches.micro_batches import cut_micro_batches


class EffectiveBatchSampler(Sampler[list[int]]):
    """Row numbers of one effective batch after the other, in an order given by (seed, epoch) alone.

    Every row comes once an epoch, and the last batch may be smaller. With `classes`, as many rows are drawn with
    replacement, all classes with equal probability.

    Args:
        rows: row numbers, int [N].
        batch_size: rows of a batch.
        seed: of the order.
        classes: the class of each row, [N], for balanced drawing; None: every row comes once.
        same_order: every epoch has the order of the first one.

    Attributes:
        epoch: set by `set_epoch`, which Lightning calls.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        classes: np.ndarray | None = None,
        same_order: bool = False,
    ) -> None:
        self.same_order = same_order
        self.rows, self.batch_size, self.seed = np.asarray(rows, dtype=np.int64), batch_size, seed
        self.epoch = 0
        self.weights: np.ndarray | None = None
        if classes is not None:
            _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
            self.weights = 1.0 / (counts[inverse] * len(counts))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, 0 if self.same_order else self.epoch))
        if self.weights is None:
            order = random.permutation(self.rows)
        else:
            order = random.choice(self.rows, size=len(self.rows), p=self.weights)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)


def eval_batches(
    rows: np.ndarray, lengths: np.ndarray, max_tokens: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """Row numbers of one micro-batch after the other, longest sequences first, each row once.

    Several ranks take the micro-batches in turns. All have as many, as Lightning needs it; the last may be empty.

    Args:
        rows: row numbers, int [N].
        lengths: tokens of every row of the file.
        max_tokens: the most tokens of a micro-batch.
        rank: the rank that takes them.
        ranks: number of ranks.
    """
    rows = np.asarray(rows, dtype=np.int64)
    batches = [rows[positions].tolist() for positions in cut_micro_batches(lengths[rows], max_tokens)]
    most = -(-len(batches) // ranks)
    own = batches[rank::ranks]
    return own + [[]] * (most - len(own))
