"""The back ends for GPUs. Without one, the flash operators are given a plain implementation on the CPU, so that the
calls go through torch's dispatcher, its schemas, its derivatives and its compiler as they would on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
from lightning_bge.runtime.compat import torch as compat
from tests.helpers.packing import CPU, CUDA, on_gpu, pack

LENGTHS = (7, 5, 5, 5, 1)
HEADS, DIM = 2, 8
SCALE = 0.6
H200 = Capabilities(compute=(9, 0), flash=True, varlen=True, nested=True)

# where no fused kernel is (on a CPU), torch's attention over jagged tensors goes through the older strided ones
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


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


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("kernel", [flash, flash_at_rate, nested, by_runs])
def test_dropout_keeps_the_mean_and_has_the_variance_of_its_rate(
    kernel: Callable[..., Tensor], rate: float, flash_calls: list[dict]
) -> None:
    lengths = (12,) * 300
    q, k, v = (torch.randn(sum(lengths), HEADS, DIM) for _ in range(3))
    given = torch.tensor(rate, dtype=torch.float64) if kernel is flash_at_rate else rate
    torch.manual_seed(0)
    found = kernel(q, k, torch.ones_like(v), pack(lengths), given, SCALE, None)[..., 0]
    pairs = zip(q.split(12), k.split(12), strict=True)
    weights = [torch.einsum("qhd,khd->qhk", a, b).mul(SCALE).softmax(-1) for a, b in pairs]
    variance = rate / (1 - rate) * torch.cat(weights).square().sum(-1)  # of each output, whose mean is 1
    scores = (found - 1) / variance.sqrt()
    count = scores.numel()
    assert abs(float(scores.mean())) < 5 / count**0.5
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.08)


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
@pytest.mark.parametrize("kernel", [flash, at_zero, by_runs])
def test_shapes_and_dtypes_on_a_gpu_that_is_not_there(kernel: Callable[..., Tensor], first: bool) -> None:
    """No value is read from the device either, as there is none: that would be an error."""
    with FakeTensorMode():  # without gradients, for which autograd would look for the device
        q, k, v = (
            torch.empty(size, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
            for size in (len(LENGTHS) if first else sum(LENGTHS), sum(LENGTHS), sum(LENGTHS))
        )
        cu_seqlens = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="cuda")
        out = kernel(q, k, v, Packing(LENGTHS, cu_seqlens), 0.1, SCALE, None)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")


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
    assert abs(float(out.detach().float().mean()) - 1) < 0.01
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
