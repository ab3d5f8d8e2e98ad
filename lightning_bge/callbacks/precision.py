"""Which precision pays on this machine."""

from __future__ import annotations

import torch


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The trainer's precision for this machine, and why.

    bf16 autocast over fp32 weights where the hardware multiplies bf16 matrices, fp32 elsewhere: without such units
    bf16 is emulated and slower.

    Args:
        accelerator: the trainer's `accelerator`; `auto` takes CUDA where it is.

    Returns:
        `bf16-mixed` or `32-true`, and the reason in words.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.get_device_capability() >= (8, 0):
            return "bf16-mixed", f"{name} multiplies bf16 matrices"
        return "32-true", f"{name} has no bf16 matrix units (they come with compute capability 8.0)"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true", "on Apple's GPUs bf16 autocast is not measured yet"
    able = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16") if able.get(name)]
    if units:
        return "bf16-mixed", f"this CPU multiplies bf16 matrices ({', '.join(units)})"
    return "32-true", "this CPU has neither AVX512-BF16 nor AMX"
