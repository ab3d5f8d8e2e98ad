"""What a training step cannot be faster than, and where its time goes: kernels, host, waits for the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_contenders import Ours, loader_of, run_once, train_ours
from gpu_parts import Bench, Case
from measures import model_flops, model_shape, wait_for_device
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightning_bge.callbacks.compile.layers import find_layers
from lightning_bge.models.attention.cuda import by_runs, flash, nested, varlen
from lightning_bge.models.attention.packed import Kernel, packed_attention
from lightning_bge.models.attention.packing import Packing
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.optimizer import OptimizerConfig, build_optimizer
from lightning_bge.types import Batch, MicroBatch

DROPOUT = 0.1
TYPICAL = 3  # batches that the floor is measured on
REPEATS = 10
PROFILED = 5  # steps that are profiled, and steps whose waits for the device are counted
LISTED = 15  # kernels in the record

# q, k, v [T, heads, head_dim] each, where the sequences lie, dropout -> [T, heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]


# Time on the device alone


def profiler(device: str) -> profile:
    """Records kernels on a GPU, operations on a CPU."""
    return profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU])


def kernels(found: profile, device: str) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of each kernel (on a CPU: of each operation), the longest first."""
    listed = []
    for event in found.key_averages():
        if device == "cuda" and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            listed.append((event.key, event.count, event.self_device_time_total / 1e3))
        elif device == "cpu":
            listed.append((event.key, event.count, event.self_cpu_time_total / 1e3))
    return sorted(listed, key=lambda row: -row[2])


def device_ms(work: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """Milliseconds of one call: on a GPU the sum of its kernels, so without launches and gaps; on a CPU wall time."""
    for _ in range(2):
        work()
    wait_for_device()
    if device == "cpu":
        since = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - since) / repeats * 1e3
    with profiler(device) as found:
        for _ in range(repeats):
            work()
        wait_for_device()
    total = sum(ms for _, _, ms in kernels(found, device))
    if total == 0:
        raise RuntimeError("the profiler saw no kernel: is CUPTI there, and may it be used?")
    return total / repeats


# The floor


def typical_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches nearest to the mean number of tokens."""
    found = list(batches)
    mean = sum(batch.tokens for batch in found) / len(found)
    return sorted(found, key=lambda batch: abs(batch.tokens - mean))[:TYPICAL]


def linear_calls(net: nn.Module, micro: MicroBatch) -> list[tuple[int, int, int, torch.dtype]]:
    """Rows, inputs, outputs and dtype of each linear layer's call, noted in a forward pass under bf16 autocast.

    Raises:
        RuntimeError: a linear layer's weight is multiplied without calling it, so that its product would be missed.
    """
    calls: list[tuple[int, int, int, torch.dtype]] = []
    device = micro.input_ids.device.type

    def note(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device) else inputs[0].dtype
        wide = inputs[0].shape[-1]
        calls.append((inputs[0].numel() // wide, wide, module.out_features, dtype))

    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            net(micro)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(layers):
        raise RuntimeError(f"only {len(calls)} of {len(layers)} linear layers were called: the floor would be too low")
    return calls


def matmul_ms(calls: Sequence[tuple[int, int, int, torch.dtype]], device: str) -> float:
    """The product of each linear layer and the two of its backward, nothing else, in milliseconds.

    Each layer has weights of its own, so that they come from memory as they do in training.
    """
    products = []
    buffers: dict[tuple[Any, ...], Tensor] = {}

    def buffer(*key: Any) -> Tensor:
        _, rows, columns, dtype = key
        if key not in buffers:
            buffers[key] = torch.randn(rows, columns, device=device).to(dtype)
        return buffers[key]

    for rows, wide, narrow, dtype in calls:
        weight = torch.randn(narrow, wide, device=device).to(dtype)
        x, grad = buffer("x", rows, wide, dtype), buffer("grad", rows, narrow, dtype)
        products.append((x, weight.t(), buffer("y", rows, narrow, dtype)))
        products.append((grad, weight, buffer("d_x", rows, wide, dtype)))
        products.append((grad.t(), x, buffer("d_weight", narrow, wide, dtype)))

    def work() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    return device_ms(work, device)


def attention_ms(
    bench: Bench, case: Case, micro: MicroBatch, attend: Attend, dropout: float, first_only: bool = False
) -> float:
    """One layer's attention over packed sequences, forward and backward, in bf16.

    Args:
        bench: device and shapes.
        case: which model.
        micro: where the sequences lie.
        attend: what computes it.
        dropout: share of the weights that is dropped.
        first_only: only the first token of each sequence asks.
    """
    q, k, v = random_heads(bench, case, micro)
    if first_only:
        q = q[: len(micro.lengths)].clone()
    packing, grad = Packing(micro.lengths, micro.cu_seqlens), torch.randn_like(q)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def work() -> None:
        torch.autograd.grad(attend(q, k, v, packing, dropout), inputs, grad)

    return device_ms(work, bench.device)


def random_heads(bench: Bench, case: Case, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [T, heads, head_dim] in bf16."""
    shape = bench.shape(case.model)
    size = (sum(micro.lengths), shape.heads, shape.hidden // shape.heads)
    q, k, v = (torch.randn(size, device=bench.device).to(torch.bfloat16) for _ in range(3))
    return q, k, v


def optimizer_ms(net: nn.Module, device: str) -> float:
    """Clipping and the product's AdamW over the model's parameters."""
    config = OptimizerConfig()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(net, config)

    def work() -> None:
        assert config.max_grad_norm is not None
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm, foreach=True)
        optimizer.step()

    return device_ms(work, device)


def measure_floor(bench: Bench, case: Case) -> dict[str, float]:
    """Matrix products, attention and the optimizer of a typical step, each alone, and their sum."""
    batches = [batch.to(bench.device) for batch in typical_batches(loader_of(bench, case, Ours().tokens))]
    folder = bench.model_folder(case.model)
    net = load_classifier(folder, 1).to(bench.device)
    firsts = [bool(getattr(layer, "first_tokens_only", False)) for layer in find_layers(net)]
    products = attention = operations = nominal = 0.0
    for micro in (micro for batch in batches for micro in batch.micro):
        calls = linear_calls(net, micro)
        products += matmul_ms(calls, bench.device)
        operations += sum(6.0 * rows * wide * narrow for rows, wide, narrow, _ in calls)
        squares = sum(length * length for length in micro.lengths)
        nominal += model_flops(model_shape(folder), sum(micro.lengths), squares)
        for first in set(firsts):
            attention += firsts.count(first) * attention_ms(bench, case, micro, as_chosen, DROPOUT, first)
    parts = {
        "matmul_ms": products / len(batches),
        "attention_ms": attention / len(batches),
        "optimizer_ms": optimizer_ms(net, bench.device),
    }
    return {
        **parts,
        "total_ms": sum(parts.values()),
        "matmul_flops": operations / len(batches),
        "matmul_flops_per_s": operations / products * 1e3,
        "model_flops": nominal / len(batches),
        "tokens": sum(batch.tokens for batch in batches) / len(batches),
        "micro_batches": sum(len(batch.micro) for batch in batches) / len(batches),
    }


# Attention back ends, each alone


def as_chosen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    """The product's attention, whichever back end it chooses."""
    a, b, c = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return packed_attention(nn.Identity(), a, b, c, None, packing=packing, dropout=dropout)[0][0]


def by_kernel(kernel: Kernel) -> Attend:
    """One of the product's kernels, asked for by name."""

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
        return kernel(q, k, v, packing, dropout, q.shape[-1] ** -0.5, None)

    return attend


def one_by_one(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    """torch's attention once for each sequence: the reference."""
    outputs = []
    for parts in zip(*(tensor.split(packing.lengths) for tensor in (q, k, v)), strict=True):
        a, b, c = (part.transpose(0, 1)[None] for part in parts)
        outputs.append(F.scaled_dot_product_attention(a, b, c, dropout_p=dropout)[0].transpose(0, 1))
    return torch.cat(outputs)


# Name, function, whether it has dropout, whether it runs on a CPU
BACK_ENDS: tuple[tuple[str, Attend, bool, bool], ...] = (
    ("as chosen", as_chosen, True, True),
    ("flash", by_kernel(flash), True, False),
    ("varlen", by_kernel(varlen), False, False),
    ("nested", by_kernel(nested), True, False),
    ("SDPA a run of equal lengths", by_kernel(by_runs), True, True),
    ("SDPA a sequence", one_by_one, True, True),
)


def measure_back_end(bench: Bench, case: Case, attend: Attend, drops: bool) -> dict[str, Any]:
    """One layer's attention over a typical step: milliseconds with and without dropout, and its error without.

    The error is the norm of the difference from the reference in fp32, over the reference's norm.
    """
    batch = typical_batches(loader_of(bench, case, Ours().tokens))[0].to(bench.device)
    found: dict[str, Any] = {}
    for rate in (0.0, DROPOUT) if drops else (0.0,):
        found[f"ms_dropout_{rate}"] = sum(attention_ms(bench, case, micro, attend, rate) for micro in batch.micro)
    micro = batch.micro[-1]
    packing = Packing(micro.lengths, micro.cu_seqlens)
    q, k, v = random_heads(bench, case, micro)
    expected = one_by_one(q.float(), k.float(), v.float(), packing, 0.0)
    difference = attend(q, k, v, packing, 0.0).float() - expected
    return {**found, "relative_error": float(difference.norm() / expected.norm())}


# Host and device


class Syncs:
    """Counts the waits for the device within a block, by the line of Python that they came from."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._caught = warnings.catch_warnings(record=True)
        self._warned: list[Any] | None = None

    def __enter__(self) -> Syncs:
        self._warned = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        assert self._warned is not None
        for warning in self._warned:
            if "called a synchronizing" in str(warning.message):
                self.places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def measure_overhead(bench: Bench, case: Case, peak: float) -> dict[str, Any]:
    """A step's time on the host and on the device, its kernels, and its waits for the device."""
    train = partial(train_ours, options=Ours())
    plain = run_once(bench, case, train, peak)
    few = replace(bench, limit=replace(bench.limit, steps=min(PROFILED, bench.limit.steps)))
    found = profiler(bench.device)
    steps = run_once(few, case, train, peak, found)["steps"]
    listed = kernels(found, bench.device)
    result = {
        "step_ms": plain["step_ms"],
        "host_ms": plain["host_ms"],
        "device_busy_ms": None,
        "kernels_per_step": None,
        "syncs_per_step": None,
        "longest": [
            {"name": name[:120], "calls_per_step": calls / steps, "ms_per_step": ms / steps}
            for name, calls, ms in listed[:LISTED]
        ],
    }
    if bench.device == "cuda":
        syncs = Syncs()
        steps_counted = run_once(few, case, train, peak, syncs)["steps"]
        result |= {
            "device_busy_ms": sum(ms for _, _, ms in listed) / steps,
            "kernels_per_step": sum(calls for _, calls, _ in listed) / steps,
            "syncs_per_step": sum(syncs.places.values()) / steps_counted,
            "sync_places": dict(syncs.places.most_common()),
        }
    return result
