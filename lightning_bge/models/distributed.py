"""What the processes of a distributed run exchange: sums of gradients, and predictions.

Gradients are added up once a step, after the last micro-batch, and not while they are computed: ranks may cut their
shards into different numbers of micro-batches, and a rank whose memory runs out may repeat its shard alone.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.compat.torch import copy_all

BUCKET_BYTES = 32 * 2**20  # large enough for the network's full speed, small beside the model


def sum_over_ranks(value: Tensor | float, device: torch.device) -> Tensor:
    """The sum of all ranks' values, 0-d float64, so that nothing is rounded that one process would not round."""
    total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter], idle: bool) -> None:
    """Replace each gradient by its sum over all ranks, in place.

    Args:
        parameters: in the same order on all ranks. What has a gradient on none stays without, so that an optimizer
            leaves it alone, as in one process.
        idle: whether some rank's shard was empty. Such a rank has no gradients and takes part with zeros, so the ranks
            first exchange which ones exist. Otherwise all ranks have the same.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if idle and trained:
        there = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        for parameter, somewhere in zip(trained, there.tolist(), strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        copy_all(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    used = BUCKET_BYTES
    for tensor in tensors:
        if used + tensor.nbytes > BUCKET_BYTES:
            found.append([])
            used = 0
        found[-1].append(tensor)
        used += tensor.nbytes
    return found


def gather(parts: list[Predictions]) -> list[Predictions]:
    """All ranks' predictions, on each of them, on the host; a rank may have none."""
    found: list[list[Predictions]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [Predictions.collect(parts)] if parts else [])
    return [part for parts_of_rank in found for part in parts_of_rank]


def without_sync(model: nn.Module | None) -> AbstractContextManager[None]:
    """Keep a `DistributedDataParallel` from adding up gradients in each backward pass."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
