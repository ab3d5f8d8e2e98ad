"""Checks that matrices are multiplied in the precision that was requested: bf16, TF32."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from lightning_bge.advisor.audit.checks.row import Fix, ObservedRun, Row, no_trace, on_off
from lightning_bge.callbacks.torch_backends import choose_precision

MIN_SHARE = 0.9  # of the matrix products that are to be in the requested precision: heads and losses may be in fp32
TF32_ERROR = 1e-5  # relative error of an fp32 product above which it was computed in TF32
NO_PRODUCT = "no matrix product was seen: the profiler does not see those in CUDA graphs and in compiled kernels"


def precision_rows(run: ObservedRun) -> list[Row]:
    """bf16 and TF32."""
    return [bf16(run), tf32(run)]


def bf16(run: ObservedRun) -> Row:
    """Matrices are multiplied in bf16, by the dtype of their inputs in a traced step."""
    row = Row("compute", "bf16 matrix products", on_off(run.requested.bf16), "", "ok", "")
    trace = run.seen.trace
    if trace is None:
        return no_trace("compute", row.name, row.requested)
    flops = trace.flops.by_dtype
    if not flops:
        return row.unknown(NO_PRODUCT)
    share = flops["bf16"] / max(trace.flops.total, 1)
    row = replace(
        row,
        in_effect=f"{share:.0%} of the matrix products",
        evidence=f"floating-point operations of one step by the dtype of their inputs: {_shares(flops)}",
    )
    if run.requested.bf16 and share < MIN_SHARE:
        text = "find what runs in fp32: a region without autocast, inputs cast to fp32, a custom autograd function"
        return replace(row, verdict="mismatch", fix=Fix(text))
    precision, why = choose_precision(run.device.type)
    if not flops["bf16"] and precision == "32-true":
        return replace(row, verdict="not applicable", evidence=f"{why}: bf16 would be emulated")
    return row


def tf32(run: ObservedRun) -> Row:
    """fp32 matrices are multiplied in TF32, by the error of such a product, and by the kernels' names."""
    row = Row("compute", "TF32", on_off(run.requested.tf32), "no", "not applicable", "")
    if run.device.type != "cuda":
        return replace(row, evidence=f"only NVIDIA GPUs have TF32, and the training ran on {run.device.type}")
    if torch.cuda.get_device_capability(run.device) < (8, 0):
        return replace(row, evidence="TF32 needs compute capability 8.0 or higher")
    error, trace = run.seen.device.fp32_error, run.seen.trace
    if error is None:
        return row.unknown("no fp32 product was computed with the run's settings")
    kernels = sum("tf32" in name.lower() for name in trace.kernels) if trace else 0
    evidence = (
        f"an fp32 product has a relative error of {error:.1e} (TF32: about 1e-4, fp32: 1e-7); {kernels} kernels have "
        "tf32 in their name"
    )
    if error > TF32_ERROR:
        return replace(row, in_effect="yes", verdict="ok", evidence=evidence)
    fp32_share = trace.flops.by_dtype["fp32"] / max(trace.flops.total, 1) if trace else 1.0
    return replace(
        row,
        verdict="mismatch" if run.requested.tf32 else "improve" if fp32_share > 1 - MIN_SHARE else "ok",
        evidence=evidence,
        fix=Fix(
            "TorchBackends(tf32=True) switches it on for a run",
            effort="one line",
            accuracy="10 bits of mantissa in fp32 products",
            yaml="trainer.callbacks: [{class_path: TorchBackends, init_args: {tf32: true}}]",
        ),
    )


def _shares(counts: Counter[str]) -> str:
    """`bf16 97.0%, fp32 3.0%`."""
    total = sum(counts.values())
    return ", ".join(f"{name} {value / total:.1%}" for name, value in counts.most_common()) or "none"
