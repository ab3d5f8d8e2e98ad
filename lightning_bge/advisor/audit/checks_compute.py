"""Rows about what computes a step: precision, optimizer, torch.compile, attention, dropout, memory."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lightning_bge.advisor.audit.checks_loop import NOTICEABLE_SHARE
from lightning_bge.advisor.audit.observation import StepTrace
from lightning_bge.advisor.audit.requested import DROPOUT, ObservedRun, dropout_rates, is_compiled, on_off
from lightning_bge.advisor.audit.result import Fix, Row, TimeSaved, Verdict
from lightning_bge.advisor.audit.trace import EAGER
from lightning_bge.callbacks.torch_backends import AMPERE, choose_precision
from lightning_bge.runtime.compat.torch import compute_capability
from lightning_bge.runtime.memory import limits
from lightning_bge.runtime.units import format_bytes

MIN_SHARE = 0.9  # of the matrix products that are to be in the requested precision: heads and losses may be in fp32
TF32_ERROR = 1e-5  # relative error of an fp32 product above which it was computed in TF32
NO_PRODUCT = "no matrix product was seen: the profiler does not see those in CUDA graphs and in compiled kernels"
COMPILED_SHARE = 0.5  # of the forward pass that is to be compiled: what is around a compiled layer stays eager
FIRST_GRAPHS = 3  # batches in which graphs are made: for the first shapes, then for dynamic ones
NEAR_LIMIT = 0.95  # of the memory: the next longer batch may not fit
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d),
)


def compute_rows(run: ObservedRun) -> list[Row]:
    """16-bit products, TF32, optimizer, compiling, attention, dropout, zero_grad, cuDNN, channels-last, memory."""
    asked, products = run.requested, run.sixteen_bit_row
    on = asked.fp16 if products.startswith("fp16") else asked.bf16
    traced = {
        sixteen_bit: Row("compute", products, on_off(on)),
        fused_optimizer: Row("compute", "fused optimizer", on_off(asked.fused)),
        compiled: Row("compute", "torch.compile", on_off(asked.compile)),
        attention: Row("compute", "attention kernel", on_off(asked.sdpa)),
        dropout: Row("compute", "dropout", on_off(asked.dropout)),
    }
    rows = [
        row.unknown("no optimizer step ended while it was observed") if (trace := run.seen.trace) is None
        else rule(row, run, trace)
        for rule, row in traced.items()
    ]  # fmt: skip
    count = sum(isinstance(part, CONVOLUTIONS) for part in run.module.modules())
    evidence = f"the model has {count} convolutions" if count else "no effect: the model has no convolution"
    no_effect = Row("compute", "cuDNN benchmark", in_effect="no effect", verdict="not applicable", evidence=evidence)
    images = replace(no_effect, name="channels-last", evidence="the model has no 4-D activations")
    return [rows[0], tf32(run), *rows[1:], zero_grad(run), no_effect, images, peak_memory(run)]


def sixteen_bit(row: Row, run: ObservedRun, trace: StepTrace) -> Row:
    """Matrices are multiplied in bf16, or in fp16, by the dtype of their inputs."""
    total, kind = trace.flops.total(), row.name[:4]
    if not total:
        return row.unknown(NO_PRODUCT)
    share = trace.flops[kind] / total
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in trace.flops.most_common())
    evidence = f"floating-point operations of one step by the dtype of their inputs: {shares}"
    row = replace(row, in_effect=f"{share:.0%} of the matrix products", evidence=evidence)
    if row.requested == on_off(True) and share < MIN_SHARE:
        text = "find what runs in fp32: a region without autocast, inputs cast to fp32, a custom autograd function"
        return replace(row, verdict="mismatch", fix=Fix(text))
    precision, why = choose_precision(run.device.type)
    if not share and precision == "32-true":
        return replace(row, verdict="not applicable", evidence=f"{why}: {kind} would be emulated")
    return row


def tf32(run: ObservedRun) -> Row:
    """fp32 matrices are multiplied in TF32, by the error of such a product."""
    row = Row("compute", "TF32", on_off(run.requested.tf32), "no", "not applicable")
    if run.device.type != "cuda":
        return replace(row, evidence=f"only NVIDIA GPUs have TF32, and the training ran on {run.device.type}")
    if compute_capability(run.device) < AMPERE:
        return replace(row, evidence="TF32 needs an NVIDIA GPU of compute capability 8.0 or higher")
    error, trace = run.seen.device.fp32_error, run.seen.trace
    if error is None:
        return row.unknown("no fp32 product was computed with the run's settings")
    evidence = f"an fp32 product has a relative error of {error:.1e} (TF32: about 1e-4, fp32: 1e-7)"
    if error > TF32_ERROR:
        return replace(row, in_effect="yes", verdict="ok", evidence=evidence)
    fp32_share = trace.flops["fp32"] / max(trace.flops.total(), 1) if trace else 1.0
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


def fused_optimizer(row: Row, run: ObservedRun, trace: StepTrace) -> Row:
    """The optimizer's fused kernel runs, by the operations of its step."""
    counts = trace.optimizer
    # fused kernels come with foreach ones, which count the steps
    kind = next((kind for kind in ("fused", "foreach") if any(f"_{kind}_" in name for name in counts)), "for loop")
    ordered = sorted(counts.items(), key=lambda one: (f"_{kind}_" not in one[0], -one[1]))
    names = ", ".join(f"{name} {count}x" for name, count in ordered[:3])
    share = trace.parts["optimizer"] / trace.seconds if trace.seconds else 0.0
    evidence = f"operations of one optimizer step: {names or 'none of torch'}; {share:.1%} of the step's time"
    row = replace(row, in_effect=kind, evidence=evidence)
    if kind == "fused" or not counts:
        return row
    if not run.requested.fused and not any("fused" in optimizer.defaults for optimizer in run.trainer.optimizers):
        return row.with_note("this optimizer has no fused kernel")
    note = "; a restored optimizer state brings its own flags" if run.requested.fused and kind == "foreach" else ""
    verdict: Verdict = "mismatch" if run.requested.fused else "improve" if share > NOTICEABLE_SHARE else "ok"
    text = "a fused kernel can save a part of what the optimizer takes, at most all of that"
    saved = TimeSaved(0.0, share / 2, share, "predicted", text)  # the middle of what is possible
    fix = Fix(f"pass fused=True to the optimizer{note}", "one argument", "none")
    return replace(row, verdict=verdict, time_saved=saved, fix=fix)


def compiled(row: Row, run: ObservedRun, trace: StepTrace) -> Row:
    """The model runs compiled, and no graph is made in batch after batch."""
    graphs, regions, share = run.seen.graphs, trace.compiled["regions"], trace.compiled["flops"]
    late = sum(count > 0 for count in graphs[FIRST_GRAPHS:])
    row = replace(
        row,
        in_effect=f"{share / max(trace.forward_flops, 1):.0%} of the forward pass",
        evidence=f"{regions} compiled regions ran in one step; {sum(graphs)} graphs were made in {len(graphs)} batches"
        if regions or sum(graphs)
        else "no compiled code ran in one step",
    )
    if late > FIRST_GRAPHS:
        text = (
            "it is recompiled in batch after batch: mark what changes as dynamic (dynamic=True), pass no Python "
            "numbers that change; TORCH_LOGS=recompiles shows the reasons"
        )
        row = row.with_note(f"in {late} of those after the first {FIRST_GRAPHS}")
        return replace(row, verdict="mismatch" if run.requested.compile else "improve", fix=Fix(text))
    if not run.requested.compile or share >= COMPILED_SHARE * max(trace.forward_flops, 1):
        return row
    if regions and not trace.forward_flops:
        return row.unknown(f"{row.evidence}; {NO_PRODUCT}")
    text = (
        "nothing was given to torch.compile: use what it returns, or `module.compile()`, or the callback CompileLayers"
    )
    if trace.compiled["lookups"]:
        text = (
            "torch.compile has given up, as its limit of recompilations was reached or as it cannot trace the code: "
            "TORCH_LOGS=recompiles,graph_breaks shows the reasons"
        )
    elif any(is_compiled(part) for part in run.module.modules()):
        text = "torch.compile skips the modules of torch.nn themselves: compile a module of your own around them"
    return replace(row, verdict="mismatch", fix=Fix(text))


def attention(row: Row, run: ObservedRun, trace: StepTrace) -> Row:
    """Attention runs in a fused kernel."""
    kernels = trace.attention
    if not kernels:
        return replace(row, in_effect="none", verdict="not applicable", evidence="no attention ran in the traced step")
    counts = ", ".join(f"{name}: {count} calls in one step" for name, count in kernels.items())
    row = replace(row, in_effect=", ".join(kernels), evidence=counts)
    if EAGER not in kernels:
        return row
    text = "load the model with attn_implementation='sdpa', or call scaled_dot_product_attention"
    verdict: Verdict = "mismatch" if run.requested.sdpa else "improve"
    return replace(row, verdict=verdict, fix=Fix(text, "one argument", "none"))


def dropout(row: Row, run: ObservedRun, trace: StepTrace) -> Row:
    """Dropout is active, by the masks drawn in a traced step."""
    in_eval_mode = list(_in_eval_mode(run.module))
    rates = [rate for rate in dropout_rates(run.module) if rate > 0]
    rates = rates[: len(rates) - sum(frozen for _, frozen in in_eval_mode)]  # frozen modules need none
    if not rates and run.requested.dropout is None:
        row = replace(row, requested=on_off(False))
    masks, batches = trace.masks, run.seen.batches_per_step
    row = replace(row, in_effect="yes" if masks else "no", evidence=f"{masks} masks drawn in one step")
    if not run.requested.dropout or not rates:
        return replace(row, verdict="ok" if masks else "not applicable")
    # Attention draws its mask within its kernel: one mask for two modules is the least that is usual. A compiled graph
    # may draw all of its masks at once.
    if masks >= len(rates) * batches / 2 or trace.compiled["masks"]:
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
    row = Row("compute", "zero_grad(set_to_none=True)", "on", "yes", "ok", "no gradient exists when a step begins")
    zeros = run.seen.steps.stale_gradients["zeros"]
    if not zeros:
        return row
    evidence = f"{zeros} optimizer steps began with gradients that were filled with zeros"
    fix = Fix("call zero_grad() without set_to_none=False", "one argument", "none")
    return replace(row, in_effect="no", verdict="mismatch", evidence=evidence, fix=fix)


def peak_memory(run: ObservedRun) -> Row:
    """The most memory that was held, against the tightest limit."""
    known = limits(run.device if run.device.type == "cuda" else None)
    peak = run.seen.device.peak_bytes
    row = Row("memory", "peak memory", in_effect=format_bytes(peak))
    if not known or not peak:
        return replace(row, verdict="unknown", evidence="no limit on memory is known")
    share = peak / known[0].total
    row = replace(row, evidence=f"{share:.0%} of {format_bytes(known[0].total)} ({known[0].name})")
    if share < NEAR_LIMIT:
        return row
    fix = Fix("use smaller micro-batches before an out-of-memory error occurs", "one number", "none")
    return replace(row, verdict="improve", fix=fix)
