"""What an audit says of each optimisation: claimed, in effect, by what evidence, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_bge.advisor.audit.observe import Observation
from lightning_bge.advisor.audit.requested import Claims, dropout_rates, is_compiled
from lightning_bge.advisor.audit.trace import EAGER
from lightning_bge.callbacks.torch_backends import choose_precision

Verdict = Literal["ok", "lie", "off", "not applicable", "unknown"]
MOST = 0.9  # share of the matrix products that is to be computed as claimed: heads and losses may be in fp32
HALF = 0.5  # of the forward pass that is to be compiled: a compiled layer's surroundings stay eager
LITTLE_PADDING = 0.3  # what batches of random lengths, padded to their longest, are allowed
UNSEEN = "no matrix product was seen: CUDA graphs and kernels that a compiler wrote hide theirs from the profiler"
FEW = 3  # batches in which something is still compiled: first shapes, then dynamic ones


@dataclass(frozen=True)
class Gain:
    """What an optimisation brings: the part of a step's time that being on saves against off; negative: it costs.

    Attributes:
        low: the lower end of a 95 % interval.
        mid: the best guess.
        high: the upper end.
        kind: `measured` by running both, or `predicted` from something else that was.
        text: in words, with what was compared.
    """

    low: float
    mid: float
    high: float
    kind: Literal["measured", "predicted"]
    text: str


@dataclass(frozen=True)
class Row:
    """One optimisation.

    Attributes:
        group: of the rows: compute, data, memory, loop, search.
        name: of the optimisation.
        claimed: what is said of it.
        in_effect: what was seen.
        verdict: `ok`; `lie`: claimed, and not so; `off`: there is something to gain; `not applicable`; `unknown`.
        evidence: what was seen of it, in figures.
        gain: what it brings, where it is on, or would bring; None: not known.
        accuracy: what the change does to results.
        effort: of the change.
        advice: what to do; empty: nothing.
        yaml: the line that does it, for this program's own settings; empty: none.
    """

    group: str
    name: str
    claimed: str
    in_effect: str
    verdict: Verdict
    evidence: str
    gain: Gain | None = None
    accuracy: str = ""
    effort: str = ""
    advice: str = ""
    yaml: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What the rows are judged by: what was seen, what is claimed, and the objects of the run.

    Attributes:
        seen: the observation.
        claims: what is said.
        module: after the run.
        trainer: likewise.
        devices: that the run is meant for, of which one was watched.
    """

    seen: Observation
    claims: Claims
    module: LightningModule
    trainer: Trainer
    devices: int = 1

    @property
    def device(self) -> torch.device:
        """Where the training ran."""
        return self.trainer.strategy.root_device


def said(value: bool | None) -> str:
    """A claim in words."""
    return "not said" if value is None else "on" if value else "off"


def shares(counts: Counter[str]) -> str:
    """Counts as shares in words: `bf16 97 %, fp32 3 %`."""
    total = sum(counts.values())
    return ", ".join(f"{name} {value / total:.1%}" for name, value in counts.most_common()) or "none"


def untraced(group: str, name: str, claimed: str) -> Row:
    """A row of what no trace was made of."""
    return Row(group, name, claimed, "?", "unknown", "no optimizer step was seen to its end, so that none was traced")


def compute_rows(case: Case) -> list[Row]:
    """Precision, optimizer, compilation, attention, dropout and what does not apply."""
    rules = (bf16, tf32, fused, compiled, attention, dropout, zero_grad)
    return [*(rule(case) for rule in rules), *not_applicable(case)]


def bf16(case: Case) -> Row:
    """Matrices are multiplied in bf16."""
    row = Row("compute", "bf16 matrix products", said(case.claims.bf16), "", "ok", "")
    if case.seen.trace is None:
        return untraced("compute", row.name, row.claimed)
    flops = case.seen.trace.flops
    if not flops:
        return replace(row, in_effect="?", verdict="unknown", evidence=UNSEEN)
    share = flops["bf16"] / max(sum(flops.values()), 1)
    row = replace(
        row,
        in_effect=f"{share:.0%} of the matrix products",
        evidence=f"floating-point operations of one step by the dtype of the inputs: {shares(flops)}",
    )
    if case.claims.bf16 and share < MOST:
        return replace(
            row,
            verdict="lie",
            advice="find what runs in fp32: a region with autocast disabled, inputs cast to fp32, a custom function",
        )
    precision, why = choose_precision(case.device.type)
    if not flops["bf16"] and precision == "32-true":
        return replace(row, verdict="not applicable", evidence=f"{why}: bf16 would be emulated")
    return row


def tf32(case: Case) -> Row:
    """fp32 matrices are multiplied in TF32: found out by multiplying some, and by the kernels' names."""
    row = Row("compute", "TF32", said(case.claims.tf32), "no", "not applicable", "")
    if case.device.type != "cuda":
        return replace(row, evidence=f"TF32 is of NVIDIA's GPUs, the training ran on {case.device.type}")
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return replace(row, evidence="TF32 comes with compute capability 8.0")
    error = case.seen.fp32_error
    if error is None:
        return replace(row, in_effect="?", verdict="unknown", evidence="no fp32 product was made while it trained")
    on = error > 1e-5
    kernels = [name for name in case.seen.trace.kernels if "tf32" in name.lower()] if case.seen.trace else []
    row = replace(
        row,
        in_effect="yes" if on else "no",
        verdict="ok",
        evidence=f"an fp32 product is off by {error:.1e} (TF32: about 1e-4, fp32: 1e-7); kernels by that name: "
        f"{len(kernels)}",
    )
    if on:
        return row
    left = case.seen.trace.flops["fp32"] / max(sum(case.seen.trace.flops.values()), 1) if case.seen.trace else 1.0
    return replace(
        row,
        verdict="lie" if case.claims.tf32 else "off" if left > 1 - MOST else "ok",
        advice="TorchBackends(tf32=True) sets it for a run",
        yaml="trainer.callbacks: [{class_path: TorchBackends, init_args: {tf32: true}}]",
        accuracy="10 bits of mantissa in fp32 products",
        effort="one line",
    )


def fused(case: Case) -> Row:
    """The optimizer's fused kernel runs."""
    row = Row("compute", "fused optimizer", said(case.claims.fused), "", "ok", "")
    trace = case.seen.trace
    if trace is None:
        return untraced("compute", row.name, row.claimed)
    steps = trace.optimizer
    # the fused kernels come with foreach ones, which count the steps
    kind = next((word for word in ("fused", "foreach") if any(f"_{word}_" in name for name in steps)), "one by one")
    telling = sorted(steps.items(), key=lambda one: (f"_{kind}_" not in one[0], -one[1]))
    most = ", ".join(f"{name} {count}x" for name, count in telling[:3])
    row = replace(row, in_effect=kind, evidence=f"operations of one optimizer step: {most or 'none of torch'}")
    if kind == "fused" or not steps:
        return row
    if case.claims.fused:
        note = "a restored optimizer state brings its own flags along" if kind == "foreach" else ""
        return replace(row, verdict="lie", advice=f"pass fused=True to the optimizer{'; ' * bool(note)}{note}")
    if not any("fused" in optimizer.defaults for optimizer in case.trainer.optimizers):
        return replace(row, evidence=f"{row.evidence}; this optimizer has no fused kernel")
    return replace(row, advice="pass fused=True to the optimizer", effort="one word", accuracy="none")


def compiled(case: Case) -> Row:
    """The model runs compiled, and is not compiled over and over."""
    row = Row("compute", "torch.compile", said(case.claims.compile), "", "ok", "")
    trace, seen = case.seen.trace, case.seen
    if trace is None:
        return untraced("compute", row.name, row.claimed)
    share = trace.compiled_flops / max(trace.forward_flops, 1)
    late = sum(count > 0 for count in seen.compiled[FEW:])
    row = replace(
        row,
        in_effect=f"{share:.0%} of the forward pass",
        evidence=f"{trace.regions} compiled regions ran in one step, {trace.lookups} calls looked for one; "
        f"{sum(seen.compiled)} graphs were made in {len(seen.compiled)} batches, in {late} of those after the first "
        f"{FEW}",
    )
    if late > FEW:
        return replace(
            row,
            verdict="lie" if case.claims.compile else "off",
            advice="it is compiled anew in batch after batch: mark what changes as dynamic (dynamic=True), pass no "
            "changing Python numbers; TORCH_LOGS=recompiles says which",
        )
    if not case.claims.compile or share >= HALF:
        return row
    if trace.regions and not trace.forward_flops:
        return replace(row, in_effect="?", verdict="unknown", evidence=f"{row.evidence}; {UNSEEN}")
    given = sum(is_compiled(part) for part in case.module.modules())
    if trace.lookups:
        why = "torch.compile has given up: its limit of recompilations was reached, or it can't trace the code"
        advice = f"{why}; it says so in TORCH_LOGS=recompiles,graph_breaks, and runs eager"
    elif given:
        advice = "torch.compile skips the modules of torch.nn themselves: compile a module of your own around them"
    else:
        advice = (
            "nothing was given to torch.compile: use what it returns, or `module.compile()`, or our `CompileLayers`"
        )
    return replace(row, verdict="lie", advice=advice)


def attention(case: Case) -> Row:
    """Attention runs in a fused kernel."""
    row = Row("compute", "attention kernel", said(case.claims.sdpa), "", "ok", "")
    trace = case.seen.trace
    if trace is None:
        return untraced("compute", row.name, row.claimed)
    if not trace.attention:
        return replace(row, in_effect="none", verdict="not applicable", evidence="no attention ran in the traced step")
    row = replace(
        row,
        in_effect=", ".join(trace.attention),
        evidence=", ".join(f"{name}: {count} calls a step" for name, count in trace.attention.items()),
    )
    if EAGER in trace.attention:
        return replace(
            row,
            verdict="off" if case.claims.sdpa is not True else "lie",
            advice="load the model with attn_implementation='sdpa', or call scaled_dot_product_attention",
            accuracy="none",
            effort="one word",
        )
    return row


def dropout(case: Case) -> Row:
    """Dropout drops."""
    trace = case.seen.trace
    asleep = list(_asleep(case.module))
    rates = [rate for rate in dropout_rates(case.module) if rate > 0]
    rates = rates[: len(rates) - sum(frozen for _, frozen in asleep)]  # what is not trained needs none
    claimed = said(case.claims.dropout if rates or case.claims.dropout is not None else False)
    row = Row("compute", "dropout", claimed, "", "ok", "")
    if trace is None:
        return untraced("compute", row.name, row.claimed)
    batches = max(case.seen.batches_per_step, 1)
    row = replace(row, in_effect="yes" if trace.masks else "no", evidence=f"{trace.masks} masks drawn in one step")
    if not case.claims.dropout or not rates:
        return replace(row, verdict="ok" if trace.masks else "not applicable")
    # attention's own dropout is drawn within its kernel; one mask in two modules is the least that is usual. A compiled
    # graph may draw those of all its masks at once
    if trace.masks >= len(rates) * batches / 2 or trace.seeds:
        return row
    names = [name for name, frozen in asleep if not frozen]
    where = f"; {len(names)} of {len(rates)} dropout modules are in eval mode, the first is {names[0]}" if names else ""
    return replace(
        row,
        verdict="lie",
        evidence=f"{row.evidence}, by {len(rates)} dropout modules in {batches} forward passes{where}",
        advice="from_pretrained returns eval mode and Lightning leaves it: call .train(), or use our TrainMode",
        accuracy="regularises as you meant it to",
        effort="one line",
    )


def _asleep(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of dropout modules in eval mode, and whether what they stand in is frozen."""
    for name, part in module.named_modules():
        if not part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            around = list(module.get_submodule(name.rpartition(".")[0]).parameters())
            yield name, bool(around) and not any(p.requires_grad for p in around)


def zero_grad(case: Case) -> Row:
    """`zero_grad` frees gradients."""
    kept, trace = case.seen.kept, case.seen.trace
    row = Row("compute", "zero_grad(set_to_none=True)", "on", "yes", "ok", "no gradient is there when a step begins")
    if (trace is not None and trace.zeroed) or kept["zeros"]:
        return replace(
            row,
            in_effect="no",
            verdict="lie",
            evidence=f"{trace.zeroed if trace else 0} operations filled gradients with zeros in one step",
            advice="call zero_grad() without set_to_none=False",
            accuracy="none",
            effort="one word",
        )
    return row


def not_applicable(case: Case) -> list[Row]:
    """Rows of the usual advice that an encoder of texts has no use for."""
    convolutions = sum(isinstance(part, nn.modules.conv._ConvNd) for part in case.module.modules())
    has = f"the model has {convolutions} convolutions" if convolutions else "no effect: the model has no convolution"
    return [
        Row("compute", "cuDNN benchmark", "not said", "no effect", "not applicable", has),
        Row("compute", "channels-last", "not said", "no effect", "not applicable", "the model has no 4-D activations"),
    ]
