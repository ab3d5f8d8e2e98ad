from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_bge.models.attention.cpu import CpuAttention
from lightning_bge.models.attention.packed import PACKED, Packing, packed_attention, register_packed_attention

HEADS, DIM = 3, 4


def slow_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """The formula, for one sequence: [length, heads, dim] each."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if window is not None:
        for q in range(len(query)):
            for k in range(len(key)):
                if abs(q - k) >= window:
                    scores[:, q, k] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def _packing(lengths: tuple[int, ...]) -> Packing:
    return Packing(lengths, torch.tensor([0, *lengths]).cumsum(0).int())


def packed_qkv(tokens: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, tokens, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("lengths", [(7,), (7, 5, 5, 5, 1), (2, 9, 2, 9)], ids=str)
def test_equals_the_formula_of_each_sequence(
    lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> None:
    qkv = packed_qkv(sum(lengths))
    out, weights = packed_attention(
        nn.Module(),
        *qkv,
        None,
        packing=_packing(lengths),
        scaling=scaling,
        sliding_window=window,
        output_attentions=False,
    )
    assert weights is None
    assert out.shape == (1, sum(lengths), HEADS, DIM)
    parts = zip(*(tensor[0].transpose(0, 1).split(lengths) for tensor in qkv), strict=True)
    expected = torch.cat([slow_attention(*part, scaling or DIM**-0.5, window) for part in parts])
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, qkv, upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, qkv, upstream[0])
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    lengths = (6,) * 400
    query, key, _ = packed_qkv(sum(lengths))
    out, _ = packed_attention(
        nn.Module(), query, key, torch.ones_like(query), None, packing=_packing(lengths), dropout=0.25
    )
    # Of ones the weighted mean is 1; kept weights are scaled by 1 / (1 - p).
    assert out.std() > 0.1
    assert abs(out.mean() - 1) < 0.02


def test_lengths_must_be_there_and_fit() -> None:
    qkv = packed_qkv(6)
    with pytest.raises(TypeError, match="packing"):
        packed_attention(nn.Module(), *qkv, None)
    with pytest.raises(ValueError, match="expected a sum of"):
        packed_attention(nn.Module(), *qkv, None, packing=_packing((4, 4)))


def test_registering_twice_changes_nothing() -> None:
    register_packed_attention()
    register_packed_attention()
    assert AttentionInterface()[PACKED] is packed_attention
    assert AttentionMaskInterface()[PACKED](config=None, anything=1) is None


@pytest.mark.parametrize("window", [None, 3])
def test_the_backward_written_out_is_the_derivative(window: int | None) -> None:
    lengths = (5, 5, 2, 1)
    qkv = [torch.randn(13, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: CpuAttention.apply(*x, lengths, 0.0, 0.7, window), qkv)


def test_dropout_hits_the_attention_weights_in_forward_and_backward_alike() -> None:
    """With unit vectors for values the output is the dropped weights themselves: a plain version can use them."""
    lengths, scale = (6, 6, 3), 0.5
    query, key = (torch.randn(1, 2, 15, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = (
        torch.cat([torch.eye(n, 6, dtype=torch.float64) for n in lengths]).expand(1, 2, 15, 6).clone().requires_grad_()
    )
    out, _ = packed_attention(
        nn.Module(), query, key, value, None, packing=_packing(lengths), dropout=0.4, scaling=scale
    )
    plain = []
    parts = (tensor[0].transpose(0, 1).split(lengths) for tensor in (query, key, value, out.transpose(1, 2)))
    for q, k, v, dropped in zip(*parts, strict=True):
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1)
        kept = dropped.transpose(0, 1)[:, :, : len(q)].detach() / weights.detach()
        assert torch.all((kept.abs() < 1e-9) | ((kept - 1 / 0.6).abs() < 1e-3))
        plain.append(torch.einsum("hqk,khd->qhd", weights * kept, v))
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), weight)
    for one, other in zip(found, torch.autograd.grad(torch.cat(plain), (query, key, value), weight[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_half_precision_is_that_of_fp32_rounded(window: int | None) -> None:
    generator, lengths = torch.Generator().manual_seed(0), (7, 5, 5, 5, 1)
    exact = [torch.randn(sum(lengths), HEADS, DIM, generator=generator, requires_grad=True) for _ in range(3)]
    half = [x.detach().half().requires_grad_() for x in exact]
    found = []
    for qkv in (exact, half):
        torch.manual_seed(1)
        out = CpuAttention.apply(*qkv, lengths, 0.0, 0.7, window)
        out.backward(torch.ones_like(out))
        found.append([out, *(x.grad for x in qkv)])
    for one, other in zip(*found, strict=True):
        assert other.dtype == torch.float16
        assert (other.float() - one).norm() < 2e-3 * one.norm() + 1e-3


@pytest.mark.parametrize("lengths", [(7, 5, 5, 5, 1), (4, 2)], ids=str)
def test_first_tokens_alone_are_the_first_rows_of_all(lengths: tuple[int, ...]) -> None:
    packing = _packing(lengths)
    query, key, value = packed_qkv(sum(lengths))
    first = packing.cu_seqlens[:-1]
    whole, _ = packed_attention(nn.Module(), query, key, value, None, packing=packing)
    alone, _ = packed_attention(nn.Module(), query[:, :, first], key, value, None, packing=packing)
    torch.testing.assert_close(alone, whole[:, first], rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(alone)
    ours = torch.autograd.grad(alone, (query, key, value), upstream)
    theirs = torch.autograd.grad(whole[:, first], (query, key, value), upstream)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_first_tokens_alone_take_no_window_and_no_other_number() -> None:
    query, key, value = packed_qkv(6)
    with pytest.raises(ValueError, match="sliding_window: expected None"):
        packed_attention(nn.Module(), query[:, :, :2], key, value, None, packing=_packing((4, 2)), sliding_window=2)
    with pytest.raises(ValueError, match="or 2 first ones, got 3"):
        packed_attention(nn.Module(), query[:, :, :3], key, value, None, packing=_packing((4, 2)))
