"""Where the sequences of a packed batch begin and end, and token totals rounded up to few sizes."""

from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bge.types import MicroBatch

Runs = tuple[tuple[int, int], ...]  # (length, count): so many neighbouring sequences of one length

# The rows that one thread block of the flash kernels takes: a bound rounded up to it launches no block more.
BLOCK = 128


class Packing:
    """Where the sequences of a packed batch begin and end.

    A plain object, so that a compiled graph does not depend on each of its values.

    Everything but `cu_seqlens` is known on the host: nothing waits for a kernel.

    Args:
        lengths: the sequences' lengths in tokens, in order; none is 0.
        cu_seqlens: int32 [N + 1], where each sequence starts, and T at the end; on the model's device.

    Attributes:
        tokens: T, the sum of the lengths.
        longest: the greatest length.
        bound: `longest`, rounded up to a multiple of 128, so that few values of it occur.
        runs: (length, count) of neighbouring sequences of one length.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor) -> None:
        self.lengths, self.cu_seqlens = lengths, cu_seqlens
        self.tokens, self.longest = sum(lengths), max(lengths)
        self.bound = -(-self.longest // BLOCK) * BLOCK
        self.runs: Runs = tuple((length, len(list(same))) for length, same in groupby(lengths))


def pad_to_bucket(micro: MicroBatch, multiple: int, sequences: int | None = None) -> MicroBatch:
    """Append dummy sequences, so that the token total is a multiple of `multiple`: few totals, few CUDA graphs.

    The real sequences come first and keep their places: whoever reads the encoder's output for them alone finds what it
    would be without the dummies, and so does the gradient. Nothing is copied to or from the host. Token ids and
    positions of the dummies are 0, which every model has; labels, rows and groups stay those of the real sequences.

    Args:
        micro: on any device.
        multiple: of the token total.
        sequences: how many there shall be with the dummies, so that `cu_seqlens` has one size too; None: at least one
            dummy, and so many that none is longer than the longest real sequence.

    Raises:
        ValueError: `multiple` is below 1, or `sequences` leaves no room for a dummy.
    """
    count, tokens, longest = len(micro.lengths), sum(micro.lengths), max(micro.lengths)
    if multiple < 1:
        raise ValueError(f"multiple: expected at least 1, got {multiple}")
    if sequences is not None and sequences <= count:
        raise ValueError(f"sequences: expected more than the {count} real ones, got {sequences}")
    least = 1 if sequences is None else sequences - count  # a dummy has at least one token
    extra = -(-(tokens + least) // multiple) * multiple - tokens
    dummies = -(-extra // longest) if sequences is None else least
    short, longer = divmod(extra, dummies)
    number = torch.arange(1, dummies + 1, dtype=torch.int32, device=micro.cu_seqlens.device)
    types = micro.token_type_ids
    return replace(
        micro,
        input_ids=F.pad(micro.input_ids, (0, extra)),
        positions=F.pad(micro.positions, (0, extra)),
        token_type_ids=None if types is None else F.pad(types, (0, extra)),
        cu_seqlens=torch.cat([micro.cu_seqlens, number * short + number.clamp(max=longer) + tokens]),
        lengths=(*micro.lengths, *[short + 1] * longer, *[short] * (dummies - longer)),
    )
