"""Rows about what feeds and surrounds a step: padding, loader, effective batch, synchronization, time of the host."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median, median_low

import numpy as np

from lightning_bge.advisor.audit.observation import FETCH, HOST, MOVE, RUN, Observation
from lightning_bge.advisor.audit.requested import ObservedRun, on_off, transformer_of
from lightning_bge.advisor.audit.result import NOT_STATED, Fix, Row, TimeSaved
from lightning_bge.advisor.audit.trace import LIBRARY
from lightning_bge.data.datamodule import TextDataModule

LITTLE_PADDING = 0.3  # what batches of random lengths, padded to their longest, are allowed
NOTICEABLE_SHARE = 0.05  # of a batch's time that is worth a change
NOTICEABLE_SECONDS = 0.002  # at least: Lightning's own loop takes half a millisecond
HOST_SHARE, HOST_SECONDS = 0.25, 0.02  # of a batch: the time between the operations of a small model is less


def loop_rows(run: ObservedRun) -> list[Row]:
    """The rows of data, then those of the training loop."""
    data = (padding, data_wait, persistent_workers, pinned_memory)
    loop = (effective_batch, last_batches, synchronization, callbacks, host_time)
    return [rule(run) for rule in (*data, *loop)]


def host_seconds(run: ObservedRun) -> list[float]:
    """For each traced step, seconds of a batch's forward, backward and step in which no operation ran."""
    return [trace.parts[HOST] / run.seen.batches_per_step for trace in run.seen.traces]


def _with_time(row: Row, run: ObservedRun, seconds: Sequence[float], condition: str, fix: Fix) -> Row:
    """The row with these seconds of a batch; where they are noticeable, with what would be saved without them.

    The interval is from the first to the last decile.
    """
    whole, usual = run.seen.cycle_seconds, median_low(seconds)
    share = usual / whole if whole else 0.0
    row = replace(row, in_effect=f"{usual * 1e3:.1f} ms a batch", evidence=f"{share:.1%} of the time of a batch")
    if share < NOTICEABLE_SHARE or usual < NOTICEABLE_SECONDS:
        return row
    low, mid, high = (float(np.quantile(seconds, q)) / whole for q in (0.1, 0.5, 0.9))
    text = f"{mid * whole * 1e3:.0f} ms of {whole * 1e3:.0f} ms a batch, {condition}"
    return replace(row, verdict="improve", time_saved=TimeSaved(low, mid, high, "measured", text), fix=fix)


# ---------------------------------------------------------------------- data


def padding(run: ObservedRun) -> Row:
    """Padding tokens that were computed."""
    row, seen, trace = Row("data", "padding"), run.seen, run.seen.trace
    tokens = [batch.tokens for batch in seen.traced if batch.tokens is not None]
    if trace is None or not tokens or len(tokens) < len(seen.traced):
        return row.unknown("the batches hold no attention_mask that would show which tokens are padding")
    if not trace.lookups:
        return row.unknown("no lookup of token ids was seen that would show how many tokens were computed")
    # other tables are of positions, of token types, of distances
    model = transformer_of(run.module)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None) if model is not None else None
    tables = {table for table, _ in trace.lookups}
    table = known if known in tables else max(tables)
    lookups = [count for one, count in trace.lookups if one == table]
    computed, real = sum(lookups) // _passes(lookups, seen), sum(tokens)
    share = max(0.0, 1 - real / computed)
    evidence = f"{computed} tokens computed in one step, {real} of them without padding"
    row = replace(row, in_effect=f"{share:.0%} of the tokens computed", evidence=evidence)
    widths = [(batch.width, batch.longest) for batch in seen.batches if batch.width and batch.longest]
    fixed_width = bool(widths) and all(width > longest for width, longest in widths)
    if share <= LITTLE_PADDING and not fixed_width:
        return row
    text = "split batches after sorting them by length"
    if fixed_width:
        usual, longest = Counter(width for width, _ in widths).most_common(1)[0][0], max(one for _, one in widths)
        row = row.with_note(f"every batch is padded to {usual} tokens, the longest text has {longest}")
        text = "pad each batch to its own longest text"
    fix = Fix(f"{text}, or use TextDataModule and BGEClassifier, which need no padding", "the collate function", "none")
    saved = TimeSaved(0.0, share, share, "predicted", f"{share:.0%} of the tokens need not be computed")
    return replace(row, verdict="mismatch" if fixed_width else "improve", time_saved=saved, fix=fix)


def _passes(lookups: list[int], seen: Observation) -> int:
    """How often each text goes through the model: twice where two dropout masks are compared."""
    padded = [batch.padded_tokens or 0 for batch in seen.traced]
    if not all(padded) or sum(lookups) % sum(padded) or max(lookups) > max(padded):
        return 1
    return max(1, sum(lookups) // sum(padded))


def data_wait(run: ObservedRun) -> Row:
    """The time that a step waits for its batch."""
    row, timed = Row("data", "data wait"), run.seen.timed
    if not timed:
        return row.unknown("no batch was timed")
    workers = getattr(run.trainer.train_dataloader, "num_workers", 0)
    how = "use more workers, or do less work in the data set" if workers else "let workers assemble batches in advance"
    yaml = "" if workers else _our_option(run, "num_workers: 2")
    how += "" if workers or yaml else " (num_workers of the loader)"
    fix = Fix(f"{how}; tokenize once, before training", "one option, or the data set", "none", yaml)
    return _with_time(row, run, [cycle.spent(FETCH, MOVE) for cycle in timed], "if no batch had to be waited for", fix)


def _our_option(run: ObservedRun, option: str) -> str:
    """The YAML of an option of batching; empty where the data module is not ours, as it may have no such option."""
    return f"data.batching.{option}" if isinstance(getattr(run.trainer, "datamodule", None), TextDataModule) else ""


def persistent_workers(run: ObservedRun) -> Row:
    """Workers live from one epoch to the next, by their process ids."""
    requested = run.requested.persistent_workers
    row = Row("data", "persistent workers", on_off(requested), "no workers", "not applicable")
    known = [epoch for epoch in run.seen.workers if epoch]
    if not known:
        return replace(row, evidence="batches are assembled in the training process")
    if len(known) < 2:
        return row.unknown("workers were seen in one epoch only")
    evidence = f"{len(known[0] & known[1])} of {len(known[0])} worker processes of epoch 1 also served epoch 2"
    if known[0] <= known[1]:  # workers of a validation loader are there too, from the end of epoch 1 on
        return replace(row, in_effect="yes", verdict="ok", evidence=evidence)
    text = "set persistent_workers=True, or num_workers=0 where the data are in memory"
    fix = Fix(text, "one argument", "none", _our_option(run, "persistent_workers: true"))
    return replace(row, in_effect="no", verdict="mismatch" if requested else "improve", evidence=evidence, fix=fix)


def pinned_memory(run: ObservedRun) -> Row:
    """Batches are in page-locked memory before they are copied to the GPU."""
    row = Row("data", "pinned memory", on_off(run.requested.pin_memory), "no", "not applicable")
    if run.device.type != "cuda":
        return replace(row, evidence=f"nothing is copied to a GPU: the training ran on {run.device.type}")
    known = [batch.pinned for batch in run.seen.batches if batch.pinned is not None]
    share = sum(known) / max(len(known), 1)
    row = replace(row, in_effect=f"{share:.0%} of the batches", evidence=f"{len(known)} batches seen on the host")
    if share == 1:
        return replace(row, verdict="ok")
    text = "set pin_memory=True; a batch class of your own needs a method pin_memory"
    fix = Fix(text, "one argument", "none", _our_option(run, "pin_memory: true"))
    return replace(row, verdict="mismatch" if run.requested.pin_memory else "improve", fix=fix)


# ---------------------------------------------------------------------- the training loop


def effective_batch(run: ObservedRun) -> Row:
    """Rows in one optimizer step."""
    requested, counts = run.requested.effective_batch, Counter(run.seen.steps.rows)
    row = Row("loop", "effective batch", NOT_STATED if requested is None else f"{requested} rows")
    if not counts:
        return row.unknown(f"no optimizer step in {len(run.seen.batches)} batches")
    usual = counts.most_common(1)[0][0]
    if usual is None:
        return row.unknown("the batches hold no tensors whose rows could be counted")
    total, several = usual * run.devices, f", on each of {run.devices} devices" if run.devices > 1 else ""
    each = ", ".join(f"{rows} ({count}x)" for rows, count in counts.items())
    row = replace(row, in_effect=f"{total} rows", evidence=f"rows in each optimizer step{several}: {each}")
    there_are = _length(getattr(run.trainer.train_dataloader, "dataset", None))
    if requested is None or total == requested or (there_are is not None and total == there_are < requested):
        return row
    text = "choose batch size and accumulation whose product is what you request; `target // physical` rounds down"
    accuracy = "learning rate and gradient noise are not those that were tuned"
    return replace(row, verdict="mismatch", fix=Fix(text, "two numbers", accuracy))


def _length(of: object) -> int | None:
    try:
        return len(of)  # type: ignore[arg-type]
    except TypeError:
        return None


def last_batches(run: ObservedRun) -> Row:
    """The batches at the end of an epoch that are too few for a whole optimizer step are trained on."""
    seen, stale = run.seen, run.seen.steps.stale_gradients["not cleared"]
    left = seen.steps.left_over[0] if seen.steps.left_over else 0
    every, total, dropped = seen.batches_per_step, _length(run.trainer.train_dataloader), _dropped_rows(run)
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


def _dropped_rows(run: ObservedRun) -> int:
    loader = run.trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    drops = getattr(loader, "drop_last", False) or getattr(sampler, "drop_last", False)
    size, rows = getattr(sampler, "batch_size", None), _length(getattr(loader, "dataset", None))
    return rows % size if drops and size and rows else 0


def synchronization(run: ObservedRun) -> Row:
    """The host reads no value from a tensor during a step."""
    row, trace = Row("loop", "synchronization", "none", "none"), run.seen.trace
    if trace is None:
        return row.unknown("no optimizer step was traced")
    if trace.host_reads and not run.seen.located:
        count = trace.host_reads.total()
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
    fix = Fix(f"each {effect}: keep the tensor, detach it, and read it once an epoch", "a few lines", "none")
    return replace(row, in_effect=f"{sum(by_line.values())} in one step", verdict="mismatch", fix=fix)


def callbacks(run: ObservedRun) -> Row:
    """What callbacks and the loop do between the batches."""
    row, timed = Row("loop", "callbacks and loop"), run.seen.timed
    if not timed:
        return row.unknown("no batch was timed")
    between = [cycle.seconds - cycle.spent(FETCH, MOVE) - cycle.actions[RUN] for cycle in timed]
    fix = Fix("do less in the named callback, or do it once an epoch", "the callback", "none")
    row = _with_time(row, run, between, "if nothing ran between the batches", fix)
    names = {name for cycle in timed for name in cycle.actions if name.startswith("[Callback]")}
    means = {name: sum(cycle.actions.get(name, 0.0) for cycle in timed) / len(timed) * 1e3 for name in names}
    most = sorted((name for name in names if "StepObserver" not in name and means[name] >= 0.1), key=means.__getitem__)
    listed = ", ".join(f"{name.removeprefix('[Callback]')} {means[name]:.1f} ms" for name in most[:-3:-1])
    return row.with_note(f"most in {listed}") if listed else row


def host_time(run: ObservedRun) -> Row:
    """Time within a step in which nothing is computed."""
    seen, row = run.seen, Row("loop", "host time within a step")
    if seen.trace is None or not seen.timed:
        return row.unknown("no optimizer step was traced")
    text = (
        "look for pauses, file access, logging or Python loops in training_step and its hooks; larger "
        "micro-batches share such time among more rows"
    )
    idle = host_seconds(run)
    fix = Fix(text, "depends on the code", "none")
    row = _with_time(row, run, idle, "if the host did not keep the step waiting", fix)
    row = replace(row, evidence=f"no operation ran in {row.evidence}")
    # Tracing itself takes time between the operations: what is left of an untraced step must be as long.
    busy = median(trace.seconds - trace.parts[HOST] for trace in seen.traces) / seen.batches_per_step
    certain = min(median_low(idle), seen.seconds(RUN) - busy)
    if certain < HOST_SHARE * seen.cycle_seconds or certain < HOST_SECONDS:
        return replace(row, verdict="ok", time_saved=None, fix=None)
    return row
