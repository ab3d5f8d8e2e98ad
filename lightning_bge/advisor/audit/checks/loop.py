"""Checks of the training loop: effective batch, last batches of an epoch, synchronization, time of the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import median

from lightning_bge.advisor.audit.checks.row import NOT_STATED, Fix, ObservedRun, Row
from lightning_bge.advisor.audit.checks.step_time import (
    host_seconds,
    is_noticeable,
    milliseconds,
    saved_without,
    share_of_batch,
)
from lightning_bge.advisor.audit.observation import FETCH, MOVE, RUN
from lightning_bge.advisor.audit.trace.reader import LIBRARY
from lightning_bge.advisor.audit.trace.step_trace import HOST

HOST_SHARE, HOST_SECONDS = 0.25, 0.02  # of a batch: the time between the operations of a small model is less


def loop_rows(run: ObservedRun) -> list[Row]:
    """Effective batch, last batches, synchronization, callbacks, host time."""
    return [rule(run) for rule in (effective_batch, last_batches, synchronization, callbacks, host_time)]


def effective_batch(run: ObservedRun) -> Row:
    """Rows in one optimizer step."""
    requested, counts = run.requested.effective_batch, Counter(run.seen.steps.rows)
    row = Row("loop", "effective batch", NOT_STATED if requested is None else f"{requested} rows", "", "ok", "")
    if not counts:
        return row.unknown(f"no optimizer step in {len(run.seen.batches)} batches")
    usual = counts.most_common(1)[0][0]
    if usual is None:
        return row.unknown("the batches hold no tensors whose rows could be counted")
    total, several = usual * run.devices, f", on each of {run.devices} devices" if run.devices > 1 else ""
    each = ", ".join(f"{rows} ({count}x)" for rows, count in counts.items())
    row = replace(row, in_effect=f"{total} rows", evidence=f"rows in each optimizer step{several}: {each}")
    there_are = _rows(run)
    if requested is None or total == requested or (there_are is not None and total == there_are < requested):
        return row
    text = "choose batch size and accumulation whose product is what you request; `target // physical` rounds down"
    accuracy = "learning rate and gradient noise are not those that were tuned"
    return replace(row, verdict="mismatch", fix=Fix(text, "two numbers", accuracy))


def _rows(run: ObservedRun) -> int | None:
    loader = run.trainer.train_dataloader
    try:
        return len(loader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return None


def last_batches(run: ObservedRun) -> Row:
    """The batches at the end of an epoch that are too few for a whole optimizer step are trained on."""
    seen, stale = run.seen, run.seen.steps.stale_gradients["not cleared"]
    left = seen.steps.left_over[0] if seen.steps.left_over else 0
    every, total, dropped = seen.batches_per_step, _batches(run), _dropped_rows(run)
    fix = Fix(
        "step with what is left at the end of an epoch, divide its loss by its own rows, and clear the gradients",
        effort="a few lines",
        accuracy="each epoch loses rows, or adds their gradients to those of the next one",
    )
    if left and (total is None or total % every):
        evidence = f"{left} batches after the last optimizer step of the epoch; it steps every {every} batches"
        evidence += "" if total is None else f", and a whole epoch has {total}, so that {total % every} are left"
    elif stale:
        evidence = f"{stale} optimizer steps began with gradients of earlier steps, which were not cleared"
    elif dropped:
        evidence = f"the loader drops the last {dropped} rows of each epoch"
        fix = replace(fix, text="set drop_last=False", effort="one argument")
    else:
        evidence = f"no batch was left after the last optimizer step of {len(seen.steps.left_over)} epochs"
        return Row("loop", "last batches of an epoch", "trained", "yes", "ok", evidence)
    return Row("loop", "last batches of an epoch", "trained", "no", "mismatch", evidence, fix=fix)


def _batches(run: ObservedRun) -> int | None:
    """Batches of a whole epoch."""
    try:
        return len(run.trainer.train_dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _dropped_rows(run: ObservedRun) -> int:
    loader = run.trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    drops = getattr(loader, "drop_last", False) or getattr(sampler, "drop_last", False)
    size, rows = getattr(sampler, "batch_size", None), _rows(run)
    return rows % size if drops and size and rows else 0


def synchronization(run: ObservedRun) -> Row:
    """The host reads no value from a tensor during a step."""
    row, trace = Row("loop", "synchronization", "none", "none", "ok", ""), run.seen.trace
    if trace is None:
        return row.unknown("no optimizer step was traced")
    if trace.host_reads and not run.seen.located:
        count = sum(trace.host_reads.values())
        return row.unknown(f"{count} values read in one step; no other step was traced with the lines of code")
    by_line = {line: count for line, count in trace.host_reads.items() if line != LIBRARY}
    by_libraries = trace.host_reads.get(LIBRARY, 0)
    texts = [", ".join(f"{line} {count}x" for line, count in by_line.items())]
    texts += [f"{by_libraries} by libraries"] * bool(by_libraries)
    row = replace(row, evidence=f"values read in one step: {'; '.join(filter(None, texts)) or 'none'}")
    if not by_line:
        return row
    effect = "makes the host wait for the GPU"
    if run.device.type != "cuda":
        effect = "costs little on a CPU, but makes the host wait on a GPU"
    text = f"each {effect}: keep the tensor, detach it, and read it once an epoch"
    return replace(
        row, in_effect=f"{sum(by_line.values())} in one step", verdict="mismatch", fix=Fix(text, "a few lines", "none")
    )


def callbacks(run: ObservedRun) -> Row:
    """What callbacks and the loop do between the batches."""
    row, timed = Row("loop", "callbacks and loop", NOT_STATED, "", "ok", ""), run.seen.timed
    if not timed:
        return row.unknown("no batch was timed")
    between = [cycle.seconds - cycle.spent(FETCH, MOVE) - cycle.actions[RUN] for cycle in timed]
    share = share_of_batch(run, between)
    totals: Counter[str] = Counter()
    for cycle in timed:
        for name, seconds in cycle.actions.items():
            if name.startswith("[Callback]") and "StepObserver" not in name:
                totals[name.removeprefix("[Callback]")] += seconds  # type: ignore[assignment]
    means = [(name, seconds / len(timed) * 1e3) for name, seconds in totals.most_common(2)]
    most = ", ".join(f"{name} {ms:.1f} ms" for name, ms in means if ms >= 0.1)
    evidence = f"{share:.1%} of the time of a batch" + f"; most in {most}" * bool(most)
    row = replace(row, in_effect=f"{milliseconds(between)} a batch", evidence=evidence)
    if not is_noticeable(run, share):
        return row
    return replace(
        row,
        verdict="improve",
        time_saved=saved_without(run, between, "if nothing ran between the batches"),
        fix=Fix("do less in the named callback, or do it once an epoch", "the callback", "none"),
    )


def host_time(run: ObservedRun) -> Row:
    """Time within a step in which nothing is computed."""
    seen = run.seen
    row = Row("loop", "host time within a step", NOT_STATED, "", "ok", "")
    if seen.trace is None or not seen.timed:
        return row.unknown("no optimizer step was traced")
    idle = host_seconds(run)
    share = share_of_batch(run, idle)
    evidence = f"no operation ran in {share:.0%} of the time of a batch"
    row = replace(row, in_effect=f"{milliseconds(idle)} a batch", evidence=evidence)
    # Tracing itself takes time between the operations: what is left of an untraced step must be as long.
    busy = median(trace.seconds - trace.parts[HOST] for trace in seen.traces) / seen.batches_per_step
    certain = min(share * seen.cycle_seconds, seen.seconds(RUN) - busy)
    if certain < HOST_SHARE * seen.cycle_seconds or certain < HOST_SECONDS:
        return row
    text = (
        "look for pauses, file access, logging or Python loops in training_step and its hooks; larger "
        "micro-batches share such time among more rows"
    )
    return replace(
        row,
        verdict="improve",
        time_saved=saved_without(run, idle, "if the host did not keep the step waiting"),
        fix=Fix(text, "depends on the code", "none"),
    )
