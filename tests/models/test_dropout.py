from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bge.models.dropout import CheapDropout, keep_bits, keep_scale, masked, use_cheap_dropout


def keep_mask(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> torch.Tensor:
    ones = torch.ones(shape, dtype=dtype)
    return masked(ones, keep_bits(ones.numel(), p, dtype)) * keep_scale(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    mask = keep_mask((400, 1000), p, dtype).double()
    assert len(mask.unique()) == 2
    share = (mask == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / mask.numel()) ** 0.5 + 2**-16)
    assert mask.max().item() == pytest.approx(1 / (1 - p), rel=5e-3 if dtype is torch.bfloat16 else 1e-4)


def test_the_four_elements_of_one_draw_are_independent() -> None:
    dropped = (keep_mask((100_000, 4), 0.3, torch.float32) == 0).double()
    assert torch.corrcoef(dropped.T).fill_diagonal_(0).abs().max() < 0.02
    assert dropped.mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.01)
    assert torch.corrcoef(torch.stack([dropped[:-1, 3], dropped[1:, 0]]))[0, 1].abs() < 0.02


def test_nothing_is_dropped_at_0_and_sizes_need_not_be_multiples_of_4() -> None:
    assert torch.equal(keep_mask((3, 7), 0.0, torch.float32), torch.ones(3, 7))
    assert keep_mask((5,), 0.5, torch.float32).shape == (5,)


def test_the_seed_decides_the_mask() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(keep_mask((64, 64), 0.1, torch.float32))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.rand(50, 60) + 1
    x.requires_grad_()
    dropout = CheapDropout(0.25)
    y = dropout(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach() / x.detach()) or torch.allclose(x.grad, y.detach() / x.detach())
    assert (x.grad == 0).any()


def test_a_mask_fits_values_of_any_layout_and_goes_into_a_tensor_that_is_there() -> None:
    values = torch.randn(6, 4, dtype=torch.bfloat16).T
    bits = keep_bits(24, 0.5, torch.bfloat16)
    expected = values * (bits.view(4, 6) != 0)
    out = torch.empty(4, 6, dtype=torch.bfloat16)
    assert torch.equal(masked(values, bits), expected)
    assert masked(values, bits, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_a_rate_is_the_same_in_the_buffer_and_on_the_host() -> None:
    dropout = CheapDropout(0.25)
    dropout.p = 0.5
    assert (dropout.p, dropout.rate.item(), dropout.host_rate.item()) == (0.5, 0.5, 0.5)
    assert not dropout.state_dict()


def test_eval_mode_0_and_1_are_as_torch_has_them() -> None:
    x = torch.randn(4, 5)
    assert CheapDropout(0.5).eval()(x) is x
    assert CheapDropout(0.0)(x) is x
    assert torch.equal(CheapDropout(1.0)(x), torch.zeros(4, 5))


def test_a_model_keeps_its_state_and_its_other_modules() -> None:
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Dropout(0.2, inplace=True), Own(0.1), nn.Dropout1d(0.1))
    keys = list(model.state_dict())
    use_cheap_dropout(model)
    assert [type(module) for module in model[1:]] == [CheapDropout, nn.Dropout, Own, nn.Dropout1d]
    assert list(model.state_dict()) == keys
    assert model[1].p == 0.2
