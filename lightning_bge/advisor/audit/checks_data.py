"""What an audit says of data, memory and the training loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import median

import torch

from lightning_bge.advisor.audit.checks_compute import LITTLE_PADDING, Case, Gain, Row, said
from lightning_bge.advisor.audit.observe import FETCH, MOVE, RUN, Observation
from lightning_bge.advisor.audit.requested import transformer_of
from lightning_bge.runtime.memory import format_bytes, limits

NOTICEABLE = 0.05  # share of a batch's time that is worth a word
NOTICEABLE_S = 0.002  # and no less: Lightning's own loop takes half a millisecond
PAUSE_S = 0.02  # small models spend their time between operations: only more than that is worth a word


def data_rows(case: Case) -> list[Row]:
    """Padding, the wait for data, workers, pinned memory."""
    return [rule(case) for rule in (padding, data_wait, workers, pinned)]


def loop_rows(case: Case) -> list[Row]:
    """Effective batch, last window, synchronisations, the host's work, peak memory."""
    return [rule(case) for rule in (effective_batch, last_window, items, callbacks, host, peak_memory)]


def padding(case: Case) -> Row:
    """Tokens that were computed and are none."""
    row = Row("data", "padding", "not said", "?", "unknown", "")
    seen, trace = case.seen, case.seen.trace
    tokens = [batch.tokens for batch in seen.traced if batch.tokens is not None]
    if trace is None or not tokens or len(tokens) < len(seen.traced):
        return replace(row, evidence="batches hold no attention_mask: how many of their tokens are real is not known")
    if not trace.looked:
        return replace(row, evidence="no lookup of token ids was seen: how many tokens were computed is not known")
    looked = trace.looked[_token_table(case, trace.looked)]
    computed, real = sum(looked) // _passes(looked, seen), sum(tokens)
    share = max(0.0, 1 - real / computed)
    row = replace(
        row,
        in_effect=f"{share:.0%} of the tokens computed",
        verdict="ok",
        evidence=f"{computed} tokens computed in one step, {real} of them real",
    )
    fixed = [batch for batch in seen.batches if batch.width is not None and batch.longest is not None]
    always = bool(fixed) and all(batch.width > batch.longest for batch in fixed)  # type: ignore[operator]
    if share <= LITTLE_PADDING and not always:
        return row
    gain = Gain(0.0, share, share, "predicted", f"{share:.0%} of the tokens need not be computed")
    if always:
        widths = Counter(batch.width for batch in fixed)
        longest = max(batch.longest or 0 for batch in fixed)
        row = replace(
            row,
            evidence=f"{row.evidence}; every batch is padded to {widths.most_common(1)[0][0]} tokens, the longest text "
            f"has {longest}",
            advice="pad each batch to its own longest text, or not at all: our data module packs",
        )
    else:
        row = replace(row, advice="cut batches after sorting by length within each, or pack them: our data module does")
    return replace(row, verdict="lie" if always else "off", gain=gain, accuracy="none", effort="the collate function")


def _token_table(case: Case, looked: dict[int, list[int]]) -> int:
    """Rows of the embedding of token ids; others are of positions, of token types, of distances."""
    model = transformer_of(case.module)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None) if model is not None else None
    return known if known in looked else max(looked)


def _passes(looked: list[int], seen: Observation) -> int:
    """How often each text goes through the model: twice where two masks of dropout are compared."""
    places = [batch.places or 0 for batch in seen.traced]
    if not all(places) or sum(looked) % sum(places) or max(looked) > max(places):
        return 1
    return max(1, sum(looked) // sum(places))


def data_wait(case: Case) -> Row:
    """The time that a step waits for its batch."""
    seen = case.seen
    waits = [_spent(cycle.actions, FETCH, MOVE) for cycle in seen.timed]
    row = Row("data", "data wait", "not said", "?", "unknown", "no batch was timed")
    if not waits:
        return row
    share = _share(case, waits)
    row = replace(row, in_effect=f"{_ms(waits)} a batch", verdict="ok", evidence=f"{share:.1%} of the time of a batch")
    if not _noticeable(case, share):
        return row
    found = getattr(case.trainer.train_dataloader, "num_workers", 0)
    how = "let workers assemble batches ahead of time" if not found else "more workers, or less work in the data set"
    return replace(
        row,
        verdict="off",
        gain=_gain(case, waits, "if batches came without waiting"),
        advice=f"{how}; tokenise once, before training",
        accuracy="none",
        effort="one setting, or the data set",
        yaml="data.batching.num_workers: 2" if not found else "",
    )


def workers(case: Case) -> Row:
    """Workers live on from one epoch to the next."""
    claimed = case.claims.persistent
    row = Row("data", "persistent workers", said(claimed), "no workers", "not applicable", "")
    known = [epoch for epoch in case.seen.workers if epoch]
    if not known:
        return replace(row, evidence="batches are assembled in the training process")
    if len(known) < 2:
        return replace(row, in_effect="?", verdict="unknown", evidence="workers were seen in one epoch only")
    same = known[0] <= known[1]  # those of a validation are there too, from the end of epoch 1 on
    row = replace(
        row,
        in_effect="yes" if same else "no",
        verdict="ok" if same else "lie" if claimed else "off",
        evidence=f"{len(known[0] & known[1])} of {len(known[0])} worker processes of epoch 1 were there in epoch 2",
    )
    if same:
        return row
    return replace(
        row,
        advice="set persistent_workers=True, or num_workers=0 where the data are in memory",
        accuracy="none",
        effort="one word",
        yaml="data.batching.persistent_workers: true",
    )


def pinned(case: Case) -> Row:
    """Batches lie in page-locked memory before they are copied to the GPU."""
    row = Row("data", "pinned memory", said(case.claims.pinned), "no", "not applicable", "")
    if case.device.type != "cuda":
        return replace(row, evidence=f"nothing is copied to a GPU: the training ran on {case.device.type}")
    known = [batch.pinned for batch in case.seen.batches if batch.pinned is not None]
    share = sum(known) / max(len(known), 1)
    row = replace(row, in_effect=f"{share:.0%} of the batches", evidence=f"{len(known)} batches looked at on the host")
    if share == 1:
        return replace(row, verdict="ok")
    return replace(
        row,
        verdict="lie" if case.claims.pinned else "off",
        advice="pin_memory=True; a batch class of your own needs a method pin_memory",
        accuracy="none",
        effort="one word",
        yaml="data.batching.pin_memory: true",
    )


def effective_batch(case: Case) -> Row:
    """Rows that one optimizer step sees."""
    asked, windows = case.claims.effective_batch, Counter(case.seen.windows)
    row = Row("loop", "effective batch", "not said" if asked is None else f"{asked} rows", "?", "unknown", "")
    if not windows:
        return replace(row, evidence=f"no optimizer step in {len(case.seen.batches)} batches")
    one = windows.most_common(1)[0][0]
    if one is None:
        return replace(row, evidence="batches hold no tensors: how many rows they have is not known")
    usual, several = one * case.devices, f", on each of {case.devices} devices" if case.devices > 1 else ""
    row = replace(
        row,
        in_effect=f"{usual} rows",
        verdict="ok",
        evidence=f"rows behind each of the optimizer steps{several}: "
        + ", ".join(f"{n} ({k}x)" for n, k in windows.items()),
    )
    rows = _rows(case)
    if asked is None or usual == asked or (rows is not None and usual == rows < asked):
        return row
    return replace(
        row,
        verdict="lie",
        advice="choose batches and accumulation whose product is what you ask for; `target // physical` rounds down",
        accuracy="learning rate and noise are not those that were tuned",
        effort="two numbers",
    )


def _rows(case: Case) -> int | None:
    loader = case.trainer.train_dataloader
    try:
        return len(loader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return None


def last_window(case: Case) -> Row:
    """The rows at the end of an epoch that make no whole window are trained on."""
    row = Row("loop", "last window of an epoch", "stepped", "yes", "ok", "")
    seen, kept = case.seen, case.seen.kept["not cleared"]
    left = seen.left[0] if seen.left else 0
    every = max(seen.batches_per_step, 1)
    total = _batches(case)
    lost = replace(
        row,
        in_effect="no",
        verdict="lie",
        advice="step at an epoch's end whatever is there, divide its loss by its own rows, and clear the gradients",
        accuracy="each epoch loses rows, or adds their gradients to the next one's",
        effort="a few lines",
    )
    if left and (total is None or total % every):
        ends = f"{left} batches behind the last optimizer step of the epoch; it steps every {every} batches"
        whole = "" if total is None else f", and a whole epoch has {total}, so that {total % every} are left"
        return replace(lost, evidence=ends + whole)
    if kept:
        return replace(lost, evidence=f"{kept} optimizer steps began with gradients of before: they were not cleared")
    dropped = _dropped(case)
    if dropped:
        text = f"the loader drops the last {dropped} rows of each epoch"
        return replace(lost, evidence=text, advice="drop_last=False", effort="one word")
    return replace(row, evidence=f"no row stayed behind the last optimizer step of {len(seen.left)} epochs")


def _batches(case: Case) -> int | None:
    """Batches of a whole epoch."""
    try:
        return len(case.trainer.train_dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _dropped(case: Case) -> int:
    loader = case.trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    dropping = getattr(loader, "drop_last", False) or getattr(sampler, "drop_last", False)
    size, rows = getattr(sampler, "batch_size", None), _rows(case)
    return rows % size if dropping and size and rows else 0


def items(case: Case) -> Row:
    """The host reads no value from a tensor while a step runs."""
    row = Row("loop", "synchronisations", "none", "none", "ok", "")
    trace = case.seen.trace
    if trace is None:
        return replace(row, in_effect="?", verdict="unknown", evidence="no optimizer step was traced")
    if trace.items and not case.seen.located:
        text = (
            f"{sum(trace.items.values())} values read in one step; from where was not found out, as no other was traced"
        )
        return replace(row, in_effect="?", verdict="unknown", evidence=text)
    own = {where: count for where, count in trace.items.items() if where != "?"}
    of_libraries = trace.items.get("?", 0)
    text = ", ".join(f"{where} {count}x" for where, count in own.items())
    rest = f"{of_libraries} by libraries" if of_libraries else ""
    row = replace(row, evidence="values read in one step: " + ("; ".join(filter(None, (text, rest))) or "none"))
    if not own:
        return row
    effect = "makes the host wait for the GPU" if case.device.type == "cuda" else "costs little on a CPU, and on a GPU"
    return replace(
        row,
        in_effect=f"{sum(own.values())} a step",
        verdict="lie",
        advice=f"each {effect}{' the host waits' if case.device.type != 'cuda' else ''}: keep the tensor, detach it, "
        "and read it once an epoch",
        accuracy="none",
        effort="a few lines",
    )


def callbacks(case: Case) -> Row:
    """What callbacks and the loop do between the batches."""
    seen = case.seen
    between = [cycle.seconds - _spent(cycle.actions, FETCH, MOVE) - cycle.actions[RUN] for cycle in seen.timed]
    row = Row("loop", "callbacks and the loop", "not said", "?", "unknown", "no batch was timed")
    if not between:
        return row
    share = _share(case, between)
    names: Counter[str] = Counter()
    for cycle in seen.timed:
        names.update({n: s for n, s in cycle.actions.items() if n.startswith("[Callback]") and "Watch" not in n})
    most = [f"{name.removeprefix('[Callback]')} {s / len(seen.timed) * 1e3:.1f} ms" for name, s in names.most_common(2)]
    row = replace(
        row,
        in_effect=f"{_ms(between)} a batch",
        verdict="ok",
        evidence=f"{share:.1%} of the time of a batch" + (f"; most of it in {', '.join(most)}" if most else ""),
    )
    if not _noticeable(case, share):
        return row
    return replace(
        row,
        verdict="off",
        gain=_gain(case, between, "if nothing ran between the batches"),
        advice="do less in the callback named, or do it once an epoch",
        accuracy="none",
        effort="the callback",
    )


def host(case: Case) -> Row:
    """Time within a step in which nothing is computed."""
    seen, trace = case.seen, case.seen.trace
    row = Row("loop", "host time within a step", "not said", "?", "unknown", "no optimizer step was traced")
    if trace is None or not seen.timed:
        return row
    idle = host_seconds(case)
    share = _share(case, idle)
    row = replace(
        row,
        in_effect=f"{_ms(idle)} a batch",
        verdict="ok",
        evidence=f"{share:.0%} of the time of a batch: no operation was running",
    )
    # the trace takes time of its own between operations: what is left without one has to be as long
    batches = max(seen.batches_per_step, 1)
    busy = median(trace.seconds - trace.parts["host"] for trace in seen.traces) / batches
    sure = min(share * seen.cycle_seconds, seen.seconds(RUN) - busy)
    if sure < 0.25 * seen.cycle_seconds or sure < PAUSE_S:
        return row
    return replace(
        row,
        verdict="off",
        gain=_gain(case, idle, "if the host did not keep the step waiting"),
        advice="look for pauses, file access, logging or Python loops in training_step and its hooks; larger "
        "micro-batches share what is left",
        accuracy="none",
        effort="depends",
    )


def host_seconds(case: Case) -> list[float]:
    """For each traced step, seconds of a batch's forward, backward and step in which no operation ran, and in which no
    other process had the cores."""
    batches = max(case.seen.batches_per_step, 1)
    return [max(0.0, trace.parts["host"] - trace.stolen) / batches for trace in case.seen.traces]


def peak_memory(case: Case) -> Row:
    """The most memory that was held, against the tightest limit."""
    known = limits(case.device if case.device.type == "cuda" else None)
    peak = case.seen.peak_bytes
    row = Row("memory", "peak memory", "not said", format_bytes(peak), "ok", "")
    if not known or not peak:
        return replace(row, verdict="unknown", evidence="no limit on memory is known")
    limit = known[0]
    share = peak / limit.total
    row = replace(row, evidence=f"{share:.0%} of {format_bytes(limit.total)} ({limit.name})")
    if share < 0.95:
        return row
    return replace(
        row, verdict="off", advice="smaller micro-batches: an out-of-memory error is near", effort="one number"
    )


# ---------------------------------------------------------------------- seconds in words


def _spent(actions: dict[str, float], *names: str) -> float:
    return sum(seconds for action, seconds in actions.items() if action.endswith(names))


def _ms(seconds: list[float]) -> str:
    return f"{float(torch.tensor(seconds).median()) * 1e3:.1f} ms"


def _share(case: Case, seconds: list[float]) -> float:
    whole = case.seen.cycle_seconds
    return float(torch.tensor(seconds).median()) / whole if whole else 0.0


def _noticeable(case: Case, share: float) -> bool:
    return share >= NOTICEABLE and share * case.seen.cycle_seconds >= NOTICEABLE_S


def _gain(case: Case, seconds: list[float], text: str) -> Gain:
    """What a batch would save without these seconds: quartiles over the batches for an interval."""
    whole = case.seen.cycle_seconds
    low, mid, high = (float(torch.tensor(seconds).quantile(q)) / whole for q in (0.1, 0.5, 0.9))
    return Gain(low, mid, high, "measured", f"{mid * whole * 1e3:.0f} ms of {whole * 1e3:.0f} ms a batch, {text}")
