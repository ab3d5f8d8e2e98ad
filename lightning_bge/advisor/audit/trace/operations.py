"""Names of torch's operations in a profiler's trace, and the floating-point operations of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
STEP = "lightning_bge.audit.step"  # marks the traced part of a step

MATMULS = {"aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::_scaled_mm"}
MATMULS |= {"aten::mkldnn_linear", "mkldnn::_linear_pointwise", "aten::_addmm_activation"}
BATCHED_MATMULS = {"aten::bmm", "aten::baddbmm"}  # an encoder multiplies batches of matrices in attention alone
ATTENTION = {  # fused kernels, outermost operation -> its name in the report
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa: flash (CPU)",
    "aten::_scaled_dot_product_flash_attention": "sdpa: flash",
    "aten::_scaled_dot_product_efficient_attention": "sdpa: efficient",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa: cuDNN",
    "aten::_scaled_dot_product_attention_math": "sdpa: math",
    "aten::_scaled_dot_product_attention_math_for_mps": "sdpa: math (MPS)",
    "aten::_flash_attention_forward": "flash, packed",
    "torch_attn::_varlen_attn": "varlen, packed",
    "CpuAttention": "packed (CPU)",
    "flash_attn::_flash_attn_varlen_forward": "flash-attn, packed",
    "flash_attn::_flash_attn_forward": "flash-attn",
    "flex_attention": "flex",
}
# Their sequences are stored one after the other without padding: the shapes do not show how many keys a query has.
PACKED = {"aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}
CPU_PACKED = "CpuAttention"  # its matrix products are operations of their own in the trace
EAGER = "eager: scores as a tensor"
SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::_safe_softmax"}
# Operations that draw random numbers. On CUDA dropout is one kernel, which contains none of the others.
DRAWS = {"aten::bernoulli_", "aten::bernoulli", "aten::random_", "aten::rand_like", "aten::rand", "aten::randint"}
DRAWS |= {"aten::native_dropout", "aten::_fused_dropout", "aten::uniform_"}
DROPOUT = {*DRAWS, "aten::dropout", "aten::dropout_", "_Drop", "_DropBackward", "aten::native_dropout_backward"}
COMPILED = re.compile(r"Torch-Compiled Region|CompiledFunction|## Call CompiledFxGraph")
BACKWARD = "autograd::engine::evaluate_function"
OPTIMIZER_STEP = "Optimizer.step#"
ZERO_GRAD = "Optimizer.zero_grad#"

Shape = tuple[Any, list[int]]  # dtype and sizes of a tensor


def part_of(name: str, in_optimizer: bool) -> str | None:
    """The part of a step's time that an operation belongs to; None: that of what it calls, or `other operations`."""
    if in_optimizer:
        return "optimizer"
    if name in ATTENTION or name in BATCHED_MATMULS or name in SOFTMAX:
        return "attention"
    if "scaled_dot_product" in name or CPU_PACKED in name:
        return "attention"
    if name in MATMULS:
        return "matrix products"
    return "dropout" if name in DROPOUT or "_Drop" in name else None


def counts_as_product(name: str) -> bool:
    """Whether the floating-point operations of a call include those of the operations that it calls."""
    return name in MATMULS or name in BATCHED_MATMULS or (name in ATTENTION and name != CPU_PACKED)


def flops_of(name: str, shapes: Sequence[Shape]) -> tuple[int, str]:
    """Floating-point operations of a matrix product or of attention, and the dtype of its inputs.

    Args:
        name: of the operation.
        shapes: of the tensors among its inputs.

    Returns:
        0 and an empty dtype for any other operation, and for packed attention.
    """
    matrices = [(dtype, shape) for dtype, shape in shapes if len(shape) >= 2]
    if len(matrices) < 2 or name in PACKED or not counts_as_product(name):
        return 0, ""
    if name in ATTENTION:
        (dtype, query), (_, key) = matrices[:2]
        keys = key[-3] if name == "flash_attn::_flash_attn_forward" else key[-2]  # [N, T, heads, D], [N, heads, T, D]
        return 4 * math.prod(query) * keys, dtype_name(dtype)
    # the first input of addmm and baddbmm is what the product is added to
    first = 1 if name in ("aten::addmm", "aten::baddbmm", "aten::_addmm_activation") and len(shapes) > 2 else 0
    if len(shapes) < first + 2:
        return 0, ""
    (dtype, a), (_, b) = shapes[first : first + 2]
    columns = b[0] if name in ("aten::mkldnn_linear", "mkldnn::_linear_pointwise") else b[-1]
    return 2 * math.prod(a) * columns, dtype_name(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16`, `fp32`, `fp64`, or torch's name."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def are_attention_scores(shape: Sequence[int]) -> bool:
    """Whether a softmax over this shape is attention's, over scores [N, heads, T, T] or [N x heads, T, T].

    A softmax for pooling has the shape [N, T, 1].
    """
    return len(shape) == 4 or (len(shape) == 3 and shape[-1] == shape[-2])


def draws_mask(name: str, inputs: Sequence[Any]) -> bool:
    """Whether an operation draws a dropout mask: itself, or as attention called with a dropout probability.

    Args:
        name: of the operation.
        inputs: of the operation, as the profiler records them.
    """
    if name in DRAWS:
        return True
    if name == "aten::_flash_attention_forward":
        rates = inputs[7:8]
    elif "scaled_dot_product" in name:
        rates = inputs[3:5]
    else:
        return False
    return any(isinstance(part, float) and 0 < part < 1 for part in rates)
