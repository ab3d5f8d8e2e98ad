"""What ranks tell each other, between real processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_bge.models import distributed as room
from lightning_bge.models.distributed import gather, sum_gradients, sum_over_ranks, without_sync
from lightning_bge.models.metrics.predictions import Predictions
from tests.helpers.rank_processes import run_ranks


def parameters(rank: int) -> list[nn.Parameter]:
    """Of several sizes and types; each rank lacks another gradient, the frozen one and the last have none at all."""
    made = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(2))]
    made += [nn.Parameter(torch.zeros(7, dtype=torch.float64)), nn.Parameter(torch.zeros(5), requires_grad=False)]
    made.append(nn.Parameter(torch.zeros(2)))
    for number, parameter in enumerate(made[:4]):
        if number != rank:
            parameter.grad = torch.full_like(parameter, 10.0**rank * (number + 1))
    return made


def exchange_all() -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    return [exchange(bucket_bytes) for bucket_bytes in (1, 100, 2**20)]


def exchange(bucket_bytes: int) -> dict[str, Any]:
    room.BUCKET_BYTES, rank = bucket_bytes, dist.get_rank()
    made = parameters(rank)
    sum_gradients(made, idle=True)
    alike = nn.Parameter(torch.zeros(1))
    alike.grad = torch.ones(1)
    sum_gradients([alike, nn.Parameter(torch.zeros(1))], idle=False)
    weight = torch.tensor(2.0**-30 + 1, dtype=torch.float64)  # no fp32 number
    part = Predictions(torch.tensor([3, rank]), torch.tensor([[3.0], [float(rank)]]), torch.tensor([0.0, 1.0]))
    found = gather([part] if rank == 0 else [])
    return {
        "gradients": [None if p.grad is None else (p.grad.dtype, p.grad.unique().tolist()) for p in made],
        "alike": alike.grad.item(),
        "sum": sum_over_ranks(weight, torch.device("cpu")).item(),
        "mixed": sum_over_ranks(1.5 if rank else torch.tensor(2.5), torch.device("cpu")).item(),
        "gathered": [(p.rows.tolist(), p.logits.tolist()) for p in found],
        "weight": weight.item(),
    }


def test_sums_and_predictions() -> None:
    first, second = run_ranks(exchange_all)
    assert first == second
    wide, double = torch.float32, torch.float64
    for found in first:
        # rank 0 has 1, 2, 3, 4 without the first, rank 1 ten times that without the second
        assert found["gradients"] == [(wide, [10.0]), (wide, [2.0]), (wide, [33.0]), (double, [44.0]), None, None]
        assert found["alike"] == 2.0
        assert found["sum"] == 2 * (1 + 2.0**-30)
        assert found["weight"] == 1 + 2.0**-30  # is left as it was
        assert found["mixed"] == 4.0
        assert found["gathered"] == [([0, 3], [[0.0], [3.0]])]


def test_buckets_hold_each_tensor_once_and_stay_small() -> None:
    tensors = [torch.zeros(n) for n in (1, 4, 300, 2, 2, 100, 1)]
    with_limit = room.BUCKET_BYTES
    try:
        room.BUCKET_BYTES = 400
        found = room._buckets(tensors)
    finally:
        room.BUCKET_BYTES = with_limit
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert all(len(bucket) == 1 or sum(t.nbytes for t in bucket) <= 400 for bucket in found)
    assert len(found) == 5
    assert room._buckets([]) == []


def test_nothing_is_held_back_in_a_module_that_is_not_wrapped() -> None:
    for model in (None, nn.Linear(1, 1)):
        with without_sync(model):
            pass
