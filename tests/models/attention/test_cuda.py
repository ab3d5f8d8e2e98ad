"""The back ends for GPUs. Without one, the flash operators are given a plain implementation on the CPU, so that the
calls go through torch's dispatcher, its schemas, its derivatives and its compiler as they would on a GPU."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from lightning_bge.callbacks.compile.layers import compile_layers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.models.attention import packed as attention
from lightning_bge.models.attention.cuda import (
    Capabilities,
    by_runs,
    capabilities,
    flash,
    flash_at_rate,
    nested,
    varlen,
)
from lightning_bge.models.attention.packed import Kind, backends_in_use, choose_backend, packed_attention
from lightning_bge.models.attention.packing import Packing
from lightning_bge.models.dropout import CheapDropout, use_cheap_dropout
from lightning_bge.runtime.compat import torch as compat

LENGTHS = (7, 5, 5, 5, 1)
HEADS, DIM = 2, 8
SCALE = 0.6
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
H200 = Capabilities(compute=(9, 0), flash=True, varlen=True, nested=True)

# where no fused kernel is (on a CPU), torch's attention over jagged tensors goes through the older strided ones
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pack(lengths: tuple[int, ...], device: torch.device = CPU) -> Packing:
    return Packing(lengths, torch.tensor([0, *lengths]).cumsum(0).int().to(device))


def inputs(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64, first: bool = False) -> list[Tensor]:
    """Query, key and value as a layer makes them: views of what its projections return."""
    sizes = [len(lengths) if first else sum(lengths), sum(lengths), sum(lengths)]
    flat = [torch.randn(1, size, HEADS * DIM, dtype=dtype, requires_grad=True) for size in sizes]
    return [tensor.view(1, -1, HEADS, DIM).transpose(1, 2)[0].transpose(0, 1) for tensor in flat]


def slow(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """The formula, sequence by sequence, in float64."""
    outputs = []
    asked = [1] * len(lengths) if len(q) != len(k) else lengths
    for a, b, c in zip(q.double().split(asked), k.double().split(lengths), v.double().split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        far = [[window is not None and abs(i - j) >= window for j in range(len(b))] for i in range(len(a))]
        weights = scores.masked_fill(torch.tensor(far, device=q.device), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, c))
    return torch.cat(outputs)


# ---------------------------------------------------------------------- the flash operators, plainly, on the CPU


class Plain(NamedTuple):
    """One sequence: its places among queries and keys, softmax, and what dropout multiplies it with."""

    queries: slice
    keys: slice
    weights: Tensor
    kept: Tensor
    sums: Tensor


def plain(q: Tensor, k: Tensor, starts: tuple[Tensor, Tensor], rate: float, seed: int, options: dict) -> list[Plain]:
    generator = torch.Generator().manual_seed(seed)
    ends = (options.get(f"window_size_{side}") for side in ("left", "right"))
    left, right = (2**31 if end is None or end < 0 else end for end in ends)
    parts = []
    for number in range(len(starts[0]) - 1):
        rows, columns = (slice(int(s[number]), int(s[number + 1])) for s in starts)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * options["scale"]
        offset = torch.arange(scores.shape[2])[None, :] - torch.arange(scores.shape[1])[:, None]
        scores = scores.masked_fill((offset < -left) | (offset > right), -torch.inf)
        kept = torch.ones_like(scores)
        if rate > 0:
            kept = (torch.rand(kept.shape, generator=generator) >= rate).to(q.dtype) / (1 - rate)
        parts.append(Plain(rows, columns, scores.softmax(-1), kept, scores.logsumexp(-1).float()))
    return parts


@pytest.fixture
def flash_calls() -> Iterator[list[dict]]:
    """torch's flash operators work on the CPU; what they were called with, in order."""
    calls: list[dict] = []

    def forward(q, k, v, starts_q, starts_k, max_q, max_k, rate, causal, debug, **options):  # type: ignore[no-untyped-def]
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert max_q >= starts_q.diff().max()
        assert max_k >= starts_k.diff().max()
        assert not causal
        assert not debug
        calls.append({"max_q": max_q, "max_k": max_k, "rate": rate, **options})
        seed = int(torch.randint(2**31, ())) if rate > 0 else 0
        parts = plain(q, k, (starts_q, starts_k), rate, seed, options)
        out = torch.cat([torch.einsum("hqk,khd->qhd", p.weights * p.kept, v[p.keys]) for p in parts])
        sums = torch.cat([p.sums for p in parts], dim=1)
        return out, sums, torch.tensor([seed, 0], dtype=torch.uint64), sums.new_empty(0), q.new_empty(0)

    def backward(grad, q, k, v, out, sums, starts_q, starts_k, max_q, max_k, rate, causal, rng_state, _, **options):  # type: ignore[no-untyped-def]
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        for p in plain(q, k, (starts_q, starts_k), rate, int(rng_state[0]), options):
            d_weights = torch.einsum("qhd,khd->hqk", grad[p.queries], v[p.keys]) * p.kept
            d_scores = p.weights * (d_weights - (d_weights * p.weights).sum(-1, keepdim=True)) * options["scale"]
            d_q[p.queries] = torch.einsum("hqk,khd->qhd", d_scores, k[p.keys])
            d_k[p.keys] = torch.einsum("hqk,qhd->khd", d_scores, q[p.queries])
            d_v[p.keys] = torch.einsum("hqk,qhd->khd", p.weights * p.kept, grad[p.queries])
        return d_q, d_k, d_v

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


# ---------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("changed", "able", "name", "reason"),
    [
        ({}, {}, "flash", "one kernel"),
        ({"dropout": False}, {}, "flash", "one kernel"),
        ({"windowed": True, "dtype": torch.float16}, {}, "flash", "one kernel"),
        ({"device": CPU}, {}, "cpu", "CPUs"),
        ({"device": torch.device("mps")}, {"compute": (0, 0)}, "sdpa", "mps"),
        ({}, {"compute": (0, 0)}, "sdpa", "cuda: no kernel"),  # not NVIDIA's
        ({"dropout": False}, {"flash": False}, "varlen", "another signature"),
        ({"dropout": True}, {"flash": False}, "nested", "another signature"),
        ({"dropout": False}, {"flash": False, "varlen": False}, "nested", "another signature"),
        ({}, {"flash": False, "nested": False}, "sdpa", "no jagged"),
        ({"dtype": torch.float32}, {}, "nested", "not float32"),
        ({"dtype": torch.float32, "windowed": True}, {}, "sdpa", "no window"),
        ({"dtype": torch.float64}, {}, "sdpa", "no fused kernel"),
        ({"head_dim": 12}, {}, "sdpa", "multiples of 8 up to 192, not 12"),
        ({"head_dim": 256}, {}, "nested", "not 256"),
        ({"dtype": torch.float16}, {"compute": (7, 5)}, "nested", "this device has 7.5"),
        ({}, {"compute": (7, 5)}, "sdpa", "no bfloat16"),
    ],
)
def test_choice(changed: dict, able: dict, name: str, reason: str) -> None:
    kind = replace(Kind(CUDA, torch.bfloat16, dropout=True, windowed=False, head_dim=64), **changed)
    backend = choose_backend(kind, replace(H200, **able))
    assert backend.name == name
    assert reason in backend.reason
    assert backend.fallback == (kind.device.type == "cuda" and name != "flash" and "no kernel" not in reason)


def test_this_torch_has_what_is_called() -> None:
    """The signatures of the private operators; where torch changes them, this says so before a GPU is at hand."""
    assert capabilities(CPU) == Capabilities(compute=(0, 0), flash=True, varlen=True, nested=True)


def test_an_operator_that_asks_for_more_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "FORWARD_ARGUMENTS", ("query", "key", "something_new"))
    assert not capabilities(CPU).flash
    monkeypatch.undo()
    monkeypatch.setattr(compat, "FLASH_OPTIONS", ("scale", "gone"))
    assert not capabilities(CPU).flash


def test_the_choice_is_logged_once_and_kept(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_in_use", {})
    monkeypatch.setattr(attention, "capabilities", lambda device: H200)
    fast = Kind(CUDA, torch.bfloat16, True, False, 64)
    slow_one = replace(fast, dtype=torch.float32, windowed=True)
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        for _ in range(2):
            attention._backend_for(fast)
            attention._backend_for(slow_one)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "packed attention on cuda:0 in bfloat16 with dropout: flash (one kernel over all sequences)"),
        (
            "WARNING",
            "packed attention on cuda:0 in float32 with dropout with a window: sdpa (flash kernels take bfloat16 or "
            "float16, not float32; nested tensors take no window)",
        ),
    ]
    assert [(kind, backend.name) for kind, backend in backends_in_use()] == [(fast, "flash"), (slow_one, "sdpa")]


def test_a_window_that_hides_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_in_use", {})
    qkv = [x.transpose(0, 1)[None] for x in inputs(LENGTHS)]
    packed_attention(nn.Module(), *qkv, None, packing=pack(LENGTHS), sliding_window=7)
    packed_attention(nn.Module(), *qkv, None, packing=pack(LENGTHS), sliding_window=6)
    assert [kind.windowed for kind, _ in backends_in_use()] == [False, True]


# ---------------------------------------------------------------------- the kernels against the formula


def at_zero(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, *rest: float | None) -> Tensor:
    return flash_at_rate(q, k, v, packing, torch.tensor(dropout, dtype=torch.float64), *rest)  # type: ignore[arg-type]


FLASH = (flash, at_zero, varlen)
OFFERED = [
    *((kernel, first, None) for kernel in (*FLASH, nested, by_runs) for first in (False, True)),
    *((kernel, False, window) for kernel in (*FLASH, by_runs) for window in (1, 3, 65)),
]


@pytest.mark.parametrize(("kernel", "first", "window"), OFFERED)
def test_kernel_equals_the_formula(
    kernel: Callable[..., Tensor], first: bool, window: int | None, flash_calls: list[dict]
) -> None:
    qkv = inputs(LENGTHS, first=first)
    out = kernel(*qkv, pack(LENGTHS), 0.0, SCALE, window)
    expected = slow(*qkv, LENGTHS, SCALE, window)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(result, qkv, upstream) for result in (out, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    if kernel in FLASH:
        (call,) = flash_calls
        assert (call["max_q"], call["max_k"]) == (1 if first else 128, 128)


@pytest.mark.parametrize("kernel", [flash, at_zero])
def test_flash_drops_the_same_weights_in_forward_and_backward(
    kernel: Callable[..., Tensor], flash_calls: list[dict]
) -> None:
    lengths = (3, 1)
    qkv, packing = inputs(lengths), pack(lengths)

    def drop(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return kernel(*tensors, packing, 0.4, SCALE, None)

    leaves = [x.detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(drop, leaves, check_undefined_grad=False, fast_mode=True)
    assert {call["rate"] for call in flash_calls} == {0.4}
    assert not torch.allclose(drop(*qkv), kernel(*qkv, packing, 0.0, SCALE, None))


@pytest.mark.parametrize("kernel", [nested, by_runs])
def test_dropout_keeps_the_mean(kernel: Callable[..., Tensor]) -> None:
    q, k, v = (x.detach() for x in inputs((6,) * 300))
    torch.manual_seed(0)
    out = kernel(q, k, torch.ones_like(v), pack((6,) * 300), 0.25, SCALE, None)
    assert out.std() > 0.1
    assert abs(out.mean() - 1) < 0.02


def test_views_are_not_copied(flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a projection returned reaches the kernel with its layout in memory."""
    monkeypatch.setattr(attention, "_in_use", {})
    seen: list[int] = []

    def record(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        seen.extend(x.data_ptr() for x in (q, k, v))
        assert all(x.is_contiguous() for x in (q, k, v))
        return q

    monkeypatch.setattr(attention, "_cpu", record)
    flat = [torch.randn(1, sum(LENGTHS), HEADS * DIM) for _ in range(3)]
    views = [x.view(1, -1, HEADS, DIM).transpose(1, 2) for x in flat]
    out, _ = packed_attention(nn.Module(), *views, None, packing=pack(LENGTHS))
    assert seen == [x.data_ptr() for x in flat]
    assert out.data_ptr() == flat[0].data_ptr()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kernel", [flash, at_zero])
def test_shapes_and_dtypes_on_a_gpu_that_is_not_there(kernel: Callable[..., Tensor], first: bool) -> None:
    with FakeTensorMode():  # without gradients, for which autograd would look for the device
        q, k, v = (
            torch.empty(size, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
            for size in (len(LENGTHS) if first else sum(LENGTHS), sum(LENGTHS), sum(LENGTHS))
        )
        cu_seqlens = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="cuda")
        out = kernel(q, k, v, Packing(LENGTHS, cu_seqlens), 0.1, SCALE, None)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")


# ---------------------------------------------------------------------- compiled layers


def bert_layers(number: int) -> nn.ModuleList:
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = attention.PACKED
    attention.register_packed_attention()
    layers = nn.ModuleList(BertLayer(config) for _ in range(number))
    use_cheap_dropout(layers)
    for module in layers.modules():
        if isinstance(module, CheapDropout) and not hasattr(module, "host_rate"):
            module.host_rate = torch.empty((), dtype=torch.float64)
    return layers


def set_rate(layers: nn.Module, rate: float) -> None:
    for module in layers.modules():
        if isinstance(module, CheapDropout):
            module.p = rate
            module.host_rate.fill_(rate)


def step(layers: nn.ModuleList, lengths: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    hidden = torch.randn(1, sum(lengths), 16, device=device, requires_grad=True)
    out = hidden
    layers.zero_grad()
    for layer in layers:
        out = layer(out, packing=pack(lengths, device))
    out.float().sum().backward()
    return out


def warm_up(layers: nn.ModuleList, device: torch.device = CPU) -> None:
    for lengths, rate in (((50, 30), 0.1), ((140, 30, 9), 0.2), ((300, 20, 10), 0.3)):
        set_rate(layers, rate)
        step(layers, lengths, device)


def outputs(layers: nn.ModuleList, rate: float, lengths: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Of one step on the same input always, with masks of the given seed."""
    set_rate(layers, rate)
    hidden = torch.randn(1, sum(lengths), 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    torch.manual_seed(seed)
    out = hidden
    for layer in layers:
        out = layer(out, packing=pack(lengths, device))
    out.float().sum().backward()
    return out.detach().float().clone()  # a CUDA graph writes into the same memory when it is replayed


def check_rates(layers: nn.ModuleList, eager: nn.ModuleList, lengths: tuple[int, ...], device: torch.device) -> None:
    """Compiled layers drop at the rate of now, with other masks in each step, and nothing at rate 0."""
    exact, near = outputs(eager, 0.0, lengths, device, 0), {"rtol": 2e-2, "atol": 5e-2}
    distances = []
    for rate in (0.05, 0.15, 0.4):
        one, other = (outputs(layers, rate, lengths, device, seed) for seed in (1, 2))
        assert not torch.allclose(one, other, **near)
        distances.append(float((one - exact).square().mean()))
        of_eager = float((outputs(eager, rate, lengths, device, 1) - exact).square().mean())
        assert distances[-1] == pytest.approx(of_eager, rel=0.35)  # another mask, the same rate
        torch.testing.assert_close(outputs(layers, 0.0, lengths, device, 3), exact, **near)
    assert distances == sorted(distances)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_layer_holds_the_flash_call_and_takes_every_rate(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(2).train()
    for layer in layers:
        layer.compile(fullgraph=True, backend="eager")
    warm_up(layers)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rate in (0.05, 0.15, 0.0):
            for lengths in ((500, 499, 3), (129, 1, 1)):
                flash_calls.clear()
                set_rate(layers, rate)
                step(layers, lengths)
                assert [call["rate"] for call in flash_calls] == [rate, rate]
                assert flash_calls[0]["max_q"] == {500: 512, 129: 256}[lengths[0]]
    layers.eval()
    flash_calls.clear()
    set_rate(layers, 0.5)
    step(layers, LENGTHS)
    assert [call["rate"] for call in flash_calls] == [0.0, 0.0]


def test_a_compiled_layer_drops_at_the_rate_of_now_and_draws_anew(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(2).train()
    eager = copy.deepcopy(layers)
    compile_layers(layers, CompileConfig(policy="always", backend="aot_eager"))
    warm_up(layers)
    with torch.compiler.set_stance("fail_on_recompile"):
        check_rates(layers, eager, (140, 30, 9), CPU)


def test_operators_that_read_a_rate_stay_out_of_cuda_graphs() -> None:
    """A replayed CUDA graph would not read the rate again."""
    operators = torch.ops.lightning_bge
    for operator in (operators.flash_attention, operators.flash_attention_backward):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags
    assert torch.Tag.nondeterministic_seeded in operators.flash_attention.default.tags


def test_a_compiled_layer_equals_the_layer(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(1)
    set_rate(layers, 0.0)
    torch.manual_seed(0)
    plain = step(layers, LENGTHS)
    wanted = [parameter.grad.clone() for parameter in layers.parameters()]
    layers[0].compile(fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(step(layers, LENGTHS), plain, rtol=1e-5, atol=1e-6)
    assert len(flash_calls) == 1
    for parameter, grad in zip(layers.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- on a GPU


def gpu_inputs(
    dtype: torch.dtype, first: bool = False, lengths: tuple[int, ...] = (300, 129, 64, 64, 1)
) -> list[Tensor]:
    sizes = [len(lengths) if first else sum(lengths), sum(lengths), sum(lengths)]
    return [torch.randn(size, 4, 64, dtype=dtype, device="cuda", requires_grad=True) for size in sizes]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("kernel", "first", "window", "dtype"),
    [
        (*offer, dtype)
        for offer in OFFERED
        for dtype in (torch.bfloat16, torch.float32)
        if dtype is torch.bfloat16 or offer[0] not in FLASH
    ],
)
def test_gpu_kernel_equals_the_formula(
    kernel: Callable[..., Tensor], first: bool, window: int | None, dtype: torch.dtype
) -> None:
    lengths = (300, 129, 64, 64, 1)
    qkv, packing = gpu_inputs(dtype, first, lengths), pack(lengths, CUDA)
    out = kernel(*qkv, packing, 0.0, 0.125, window)
    expected = slow(*qkv, lengths, 0.125, window)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 5e-3, "atol": 5e-3}  # TF32 may be on
    torch.testing.assert_close(out.double(), expected, **close)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, qkv, upstream)
    theirs = torch.autograd.grad(expected, qkv, upstream.double())
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kernel", [flash, at_zero, nested, by_runs])
def test_gpu_dropout_keeps_the_mean_and_hits_forward_and_backward_alike(kernel: Callable[..., Tensor]) -> None:
    lengths = (100,) * 64
    q, k, v = gpu_inputs(torch.bfloat16, lengths=lengths)
    packing = pack(lengths, CUDA)
    ones = torch.ones_like(v, requires_grad=True)
    torch.manual_seed(1)
    out = kernel(q, k, ones, packing, 0.25, 0.125, None)
    assert out.float().std() > 0.02
    assert abs(float(out.float().mean()) - 1) < 0.01
    # linear in the values: sum(upstream * out) = sum(gradient * values), unless the backward draws a mask of its own
    upstream = (out - 1).detach()
    (grad,) = torch.autograd.grad(out, ones, upstream)
    torch.testing.assert_close(grad.double().sum(), (upstream.double() * out.double()).sum(), rtol=0.05, atol=0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(kernel(q, k, ones, packing, 0.25, 0.125, None), out)
    assert not torch.equal(kernel(q, k, ones, packing, 0.25, 0.125, None), out)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_packed_attention_waits_for_nothing(dtype: torch.dtype, rate: float) -> None:
    lengths = (300, 129, 64, 64, 1)
    qkv = [x.detach().transpose(0, 1)[None].requires_grad_() for x in gpu_inputs(dtype, lengths=lengths)]
    packing = pack(lengths, CUDA)

    def run() -> None:
        out, _ = packed_attention(nn.Module(), *qkv, None, packing=packing, dropout=rate)
        out.sum().backward()

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = {backend.name for kind, backend in backends_in_use() if kind.device.type == "cuda" and kind.dtype is dtype}
    assert used == ({"flash"} if dtype is torch.bfloat16 else {"nested"})


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_a_compiled_layer_takes_every_rate_and_draws_anew(mode: Any, fresh_graphs: None) -> None:
    layers = bert_layers(2).cuda().train()
    eager = copy.deepcopy(layers)
    compile_layers(layers, CompileConfig(policy="always", mode=mode))
    lengths = (140, 30, 9)  # of the warm-up: with reduce-overhead other totals are compiled anew
    with torch.autocast("cuda", dtype=torch.bfloat16):
        warm_up(layers, CUDA)
        with torch.compiler.set_stance("fail_on_recompile"):
            check_rates(layers, eager, lengths, CUDA)


@pytest.mark.gpu
@on_gpu
def test_gpu_a_layer_compiled_by_default_takes_new_lengths(fresh_graphs: None) -> None:
    layers = bert_layers(2).cuda().train()
    compile_layers(layers, CompileConfig(policy="always"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        warm_up(layers, CUDA)
        with torch.compiler.set_stance("fail_on_recompile"):
            for lengths in ((500, 499, 3), (129, 1, 1)):
                assert step(layers, lengths, CUDA).isfinite().all()
