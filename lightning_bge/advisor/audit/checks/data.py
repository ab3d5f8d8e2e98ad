"""Checks of the data: padding, the wait for batches, workers, pinned memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lightning_bge.advisor.audit.checks.row import NOT_STATED, Fix, ObservedRun, Row, TimeSaved, on_off
from lightning_bge.advisor.audit.checks.step_time import is_noticeable, milliseconds, saved_without, share_of_batch
from lightning_bge.advisor.audit.observation import FETCH, MOVE, Observation
from lightning_bge.advisor.audit.requested import transformer_of

LITTLE_PADDING = 0.3  # what batches of random lengths, padded to their longest, are allowed


def data_rows(run: ObservedRun) -> list[Row]:
    """Padding, data wait, persistent workers, pinned memory."""
    return [rule(run) for rule in (padding, data_wait, persistent_workers, pinned_memory)]


def padding(run: ObservedRun) -> Row:
    """Padding tokens that were computed."""
    row = Row("data", "padding", NOT_STATED, "", "ok", "")
    seen, trace = run.seen, run.seen.trace
    tokens = [batch.tokens for batch in seen.traced if batch.tokens is not None]
    if trace is None or not tokens or len(tokens) < len(seen.traced):
        return row.unknown("the batches hold no attention_mask that would show which tokens are padding")
    if not trace.embedding_lookups:
        return row.unknown("no lookup of token ids was seen that would show how many tokens were computed")
    lookups = trace.embedding_lookups[_token_table(run, trace.embedding_lookups)]
    computed, real = sum(lookups) // _passes(lookups, seen), sum(tokens)
    share = max(0.0, 1 - real / computed)
    row = replace(
        row,
        in_effect=f"{share:.0%} of the tokens computed",
        evidence=f"{computed} tokens computed in one step, {real} of them without padding",
    )
    masked = [batch for batch in seen.batches if batch.width is not None and batch.longest is not None]
    fixed_width = bool(masked) and all(batch.width > batch.longest for batch in masked)  # type: ignore[operator]
    if share <= LITTLE_PADDING and not fixed_width:
        return row
    if fixed_width:
        widths = Counter(batch.width for batch in masked)
        longest = max(batch.longest or 0 for batch in masked)
        row = row.with_note(
            f"every batch is padded to {widths.most_common(1)[0][0]} tokens, the longest text has {longest}"
        )
        text = "pad each batch to its own longest text"
    else:
        text = "split batches after sorting them by length"
    saved = TimeSaved(0.0, share, share, "predicted", f"{share:.0%} of the tokens need not be computed")
    return replace(
        row,
        verdict="mismatch" if fixed_width else "improve",
        time_saved=saved,
        fix=Fix(
            f"{text}, or use TextDataModule and BGEClassifier, which need no padding", "the collate function", "none"
        ),
    )


def _token_table(run: ObservedRun, lookups: dict[int, list[int]]) -> int:
    """Rows of the embedding of token ids; other tables are of positions, of token types, of distances."""
    model = transformer_of(run.module)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None) if model is not None else None
    return known if known in lookups else max(lookups)


def _passes(lookups: list[int], seen: Observation) -> int:
    """How often each text goes through the model: twice where two dropout masks are compared."""
    padded = [batch.padded_tokens or 0 for batch in seen.traced]
    if not all(padded) or sum(lookups) % sum(padded) or max(lookups) > max(padded):
        return 1
    return max(1, sum(lookups) // sum(padded))


def data_wait(run: ObservedRun) -> Row:
    """The time that a step waits for its batch."""
    row = Row("data", "data wait", NOT_STATED, "", "ok", "")
    waits = [cycle.spent(FETCH, MOVE) for cycle in run.seen.timed]
    if not waits:
        return row.unknown("no batch was timed")
    share = share_of_batch(run, waits)
    row = replace(row, in_effect=f"{milliseconds(waits)} a batch", evidence=f"{share:.1%} of the time of a batch")
    if not is_noticeable(run, share):
        return row
    workers = getattr(run.trainer.train_dataloader, "num_workers", 0)
    how = "use more workers, or do less work in the data set" if workers else "let workers assemble batches in advance"
    return replace(
        row,
        verdict="improve",
        time_saved=saved_without(run, waits, "if no batch had to be waited for"),
        fix=Fix(
            f"{how}; tokenize once, before training",
            effort="one option, or the data set",
            accuracy="none",
            yaml="" if workers else "data.batching.num_workers: 2",
        ),
    )


def persistent_workers(run: ObservedRun) -> Row:
    """Workers live from one epoch to the next, by their process ids."""
    requested = run.requested.persistent_workers
    row = Row("data", "persistent workers", on_off(requested), "no workers", "not applicable", "")
    known = [epoch for epoch in run.seen.workers if epoch]
    if not known:
        return replace(row, evidence="batches are assembled in the training process")
    if len(known) < 2:
        return row.unknown("workers were seen in one epoch only")
    same = known[0] <= known[1]  # workers of a validation loader are there too, from the end of epoch 1 on
    evidence = f"{len(known[0] & known[1])} of {len(known[0])} worker processes of epoch 1 also served epoch 2"
    if same:
        return replace(row, in_effect="yes", verdict="ok", evidence=evidence)
    return replace(
        row,
        in_effect="no",
        verdict="mismatch" if requested else "improve",
        evidence=evidence,
        fix=Fix(
            "set persistent_workers=True, or num_workers=0 where the data are in memory",
            effort="one argument",
            accuracy="none",
            yaml="data.batching.persistent_workers: true",
        ),
    )


def pinned_memory(run: ObservedRun) -> Row:
    """Batches are in page-locked memory before they are copied to the GPU."""
    row = Row("data", "pinned memory", on_off(run.requested.pin_memory), "no", "not applicable", "")
    if run.device.type != "cuda":
        return replace(row, evidence=f"nothing is copied to a GPU: the training ran on {run.device.type}")
    known = [batch.pinned for batch in run.seen.batches if batch.pinned is not None]
    share = sum(known) / max(len(known), 1)
    row = replace(row, in_effect=f"{share:.0%} of the batches", evidence=f"{len(known)} batches seen on the host")
    if share == 1:
        return replace(row, verdict="ok")
    return replace(
        row,
        verdict="mismatch" if run.requested.pin_memory else "improve",
        fix=Fix(
            "set pin_memory=True; a batch class of your own needs a method pin_memory",
            effort="one argument",
            accuracy="none",
            yaml="data.batching.pin_memory: true",
        ),
    )
