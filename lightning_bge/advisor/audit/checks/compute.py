"""Checks of what computes a step: optimizer, torch.compile, attention, dropout, zero_grad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lightning_bge.advisor.audit.checks.precision import NO_PRODUCT
from lightning_bge.advisor.audit.checks.row import NOT_STATED, Fix, ObservedRun, Row, no_trace, on_off
from lightning_bge.advisor.audit.requested import DROPOUT, dropout_rates, is_compiled
from lightning_bge.advisor.audit.trace.operations import EAGER
from lightning_bge.advisor.audit.trace.step_trace import StepTrace

COMPILED_SHARE = 0.5  # of the forward pass that is to be compiled: what is around a compiled layer stays eager
FIRST_GRAPHS = 3  # batches in which graphs are made: for the first shapes, then for dynamic ones
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d),
)


def compute_rows(run: ObservedRun) -> list[Row]:
    """Optimizer, torch.compile, attention, dropout, zero_grad, cuDNN benchmark, channels-last."""
    rules = (fused_optimizer, compiled, attention, dropout, zero_grad, cudnn_benchmark, channels_last)
    return [rule(run) for rule in rules]


def fused_optimizer(run: ObservedRun) -> Row:
    """The optimizer's fused kernel runs, by the operations of a traced step."""
    row = Row("compute", "fused optimizer", on_off(run.requested.fused), "", "ok", "")
    trace = run.seen.trace
    if trace is None:
        return no_trace("compute", row.name, row.requested)
    counts = trace.optimizer.operations
    # fused kernels come with foreach ones, which count the steps
    kind = next((kind for kind in ("fused", "foreach") if any(f"_{kind}_" in name for name in counts)), "for loop")
    ordered = sorted(counts.items(), key=lambda one: (f"_{kind}_" not in one[0], -one[1]))
    names = ", ".join(f"{name} {count}x" for name, count in ordered[:3])
    row = replace(row, in_effect=kind, evidence=f"operations of one optimizer step: {names or 'none of torch'}")
    if kind == "fused" or not counts:
        return row
    if run.requested.fused:
        note = "; a restored optimizer state brings its own flags" if kind == "foreach" else ""
        return replace(row, verdict="mismatch", fix=Fix(f"pass fused=True to the optimizer{note}"))
    if not any("fused" in optimizer.defaults for optimizer in run.trainer.optimizers):
        return row.with_note("this optimizer has no fused kernel")
    return replace(row, fix=Fix("pass fused=True to the optimizer", "one argument", "none"))


def compiled(run: ObservedRun) -> Row:
    """The model runs compiled, and no graph is made in batch after batch."""
    row = Row("compute", "torch.compile", on_off(run.requested.compile), "", "ok", "")
    trace, graphs = run.seen.trace, run.seen.graphs
    if trace is None:
        return no_trace("compute", row.name, row.requested)
    late = sum(count > 0 for count in graphs[FIRST_GRAPHS:])
    row = replace(
        row,
        in_effect=f"{trace.flops.compiled / max(trace.flops.forward, 1):.0%} of the forward pass",
        evidence=f"{trace.compiled.regions} compiled regions ran in one step; {sum(graphs)} graphs were made in "
        f"{len(graphs)} batches"
        if trace.compiled.regions or sum(graphs)
        else "no compiled code ran in one step",
    )
    if late > FIRST_GRAPHS:
        text = (
            "it is recompiled in batch after batch: mark what changes as dynamic (dynamic=True), pass no Python "
            "numbers that change; TORCH_LOGS=recompiles shows the reasons"
        )
        row = row.with_note(f"in {late} of those after the first {FIRST_GRAPHS}")
        return replace(row, verdict="mismatch" if run.requested.compile else "improve", fix=Fix(text))
    if not run.requested.compile or trace.flops.compiled >= COMPILED_SHARE * max(trace.flops.forward, 1):
        return row
    if trace.compiled.regions and not trace.flops.forward:
        return row.unknown(f"{row.evidence}; {NO_PRODUCT}")
    return replace(row, verdict="mismatch", fix=Fix(_why_eager(run.module, trace)))


def _why_eager(module: nn.Module, trace: StepTrace) -> str:
    if trace.compiled.lookups:
        return (
            "torch.compile has given up, as its limit of recompilations was reached or as it cannot trace the code: "
            "TORCH_LOGS=recompiles,graph_breaks shows the reasons"
        )
    if any(is_compiled(part) for part in module.modules()):
        return "torch.compile skips the modules of torch.nn themselves: compile a module of your own around them"
    return (
        "nothing was given to torch.compile: use what it returns, or `module.compile()`, or the callback CompileLayers"
    )


def attention(run: ObservedRun) -> Row:
    """Attention runs in a fused kernel."""
    row = Row("compute", "attention kernel", on_off(run.requested.sdpa), "", "ok", "")
    trace = run.seen.trace
    if trace is None:
        return no_trace("compute", row.name, row.requested)
    kernels = trace.attention
    if not kernels:
        return replace(row, in_effect="none", verdict="not applicable", evidence="no attention ran in the traced step")
    counts = ", ".join(f"{name}: {count} calls in one step" for name, count in kernels.items())
    row = replace(row, in_effect=", ".join(kernels), evidence=counts)
    if EAGER not in kernels:
        return row
    return replace(
        row,
        verdict="mismatch" if run.requested.sdpa else "improve",
        fix=Fix(
            "load the model with attn_implementation='sdpa', or call scaled_dot_product_attention",
            effort="one argument",
            accuracy="none",
        ),
    )


def dropout(run: ObservedRun) -> Row:
    """Dropout is active, by the masks drawn in a traced step."""
    trace = run.seen.trace
    in_eval_mode = list(_in_eval_mode(run.module))
    rates = [rate for rate in dropout_rates(run.module) if rate > 0]
    rates = rates[: len(rates) - sum(frozen for _, frozen in in_eval_mode)]  # frozen modules need none
    requested = run.requested.dropout
    row = Row("compute", "dropout", on_off(requested if rates or requested is not None else False), "", "ok", "")
    if trace is None:
        return no_trace("compute", row.name, row.requested)
    masks, batches = trace.dropout, run.seen.batches_per_step
    row = replace(row, in_effect="yes" if masks.drawn else "no", evidence=f"{masks.drawn} masks drawn in one step")
    if not requested or not rates:
        return replace(row, verdict="ok" if masks.drawn else "not applicable")
    # Attention draws its mask within its kernel: one mask for two modules is the least that is usual. A compiled graph
    # may draw all of its masks at once.
    if masks.drawn >= len(rates) * batches / 2 or masks.compiled:
        return row
    row = row.with_note(f"there are {len(rates)} dropout modules and {batches} forward passes")
    names = [name for name, frozen in in_eval_mode if not frozen]
    if names:
        row = row.with_note(f"{len(names)} of {len(rates)} dropout modules are in eval mode, the first is {names[0]}")
    text = "from_pretrained returns a model in eval mode and Lightning keeps it: call .train(), or use TrainMode"
    return replace(row, verdict="mismatch", fix=Fix(text, "one line", "the model is regularized as configured"))


def _in_eval_mode(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of dropout modules in eval mode, and whether the module around each is frozen."""
    for name, part in module.named_modules():
        if not part.training and isinstance(part, DROPOUT) and part.p > 0:
            around = list(module.get_submodule(name.rpartition(".")[0]).parameters())
            yield name, bool(around) and not any(p.requires_grad for p in around)


def zero_grad(run: ObservedRun) -> Row:
    """`zero_grad` frees gradients."""
    name, trace = "zero_grad(set_to_none=True)", run.seen.trace
    fills = trace.optimizer.zero_fills if trace else 0
    if not fills and not run.seen.steps.stale_gradients["zeros"]:
        return Row("compute", name, "on", "yes", "ok", "no gradient exists when a step begins")
    evidence = f"{fills} operations filled gradients with zeros in one step"
    fix = Fix("call zero_grad() without set_to_none=False", "one argument", "none")
    return Row("compute", name, "on", "no", "mismatch", evidence, fix=fix)


def cudnn_benchmark(run: ObservedRun) -> Row:
    """cuDNN benchmarks convolutions, which text encoders do not have."""
    count = sum(isinstance(part, CONVOLUTIONS) for part in run.module.modules())
    evidence = f"the model has {count} convolutions" if count else "no effect: the model has no convolution"
    return Row("compute", "cuDNN benchmark", NOT_STATED, "no effect", "not applicable", evidence)


def channels_last(run: ObservedRun) -> Row:
    """A memory format for images."""
    evidence = "the model has no 4-D activations"
    return Row("compute", "channels-last", NOT_STATED, "no effect", "not applicable", evidence)
