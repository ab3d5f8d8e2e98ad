"""An audit of this program's own runs: each optimisation is a setting here, so that more can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.audit.ablation import Variation
from lightning_bge.advisor.audit.audit import Audit, AuditConfig, Subject, audit_subject, precision_of
from lightning_bge.advisor.audit.checks_compute import Case, Gain, Row
from lightning_bge.advisor.audit.checks_search import search_rows
from lightning_bge.advisor.audit.observe import FETCH, MOVE
from lightning_bge.advisor.audit.requested import Claims
from lightning_bge.advisor.audit.scorecard import WORTH
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.objective import TrialSetup
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache

PROBED = 16  # batches in which `CompileLayers` can warm up, time steps, and watch a layer
FOREVER = 10**9  # steps over which compiling may pay: asked is what it saves a step, not whether


def audit_own(own: OwnRun, config: AuditConfig) -> Audit:
    """Audit a run of this program: as `audit`, and with its settings switched off and on.

    Args:
        own: what is audited.
        config: how much is measured.
    """
    claimed = own.compile.policy == "always" or None
    return audit_subject(own, Claims(effective_batch=own.build({}).datamodule.batch_size, compile=claimed), config)


@dataclass(frozen=True)
class OwnRun(Subject):
    """What is audited.

    Attributes:
        build: makes fresh objects from settings by their dotted names.
        hpo: the search's settings.
        steps: what its trials report.
        compile: when layers are compiled.
        encoder: loads once for all.
    """

    build: Callable[[dict[str, Any]], TrialSetup]
    hpo: StudyConfig
    steps: Steps
    compile: CompileConfig
    encoder: EncoderCache = field(default_factory=EncoderCache)

    def run(
        self, settings: dict[str, Any], callbacks: Sequence[Callback], limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """Train as a trial of a search does."""
        setup = self.build(settings)
        setup.model.load_encoder_with(self.encoder.load)
        compiling = [] if any(isinstance(one, CompileLayers) for one in callbacks) else [CompileLayers(self.compile)]
        trainer = setup.make_trainer(callbacks=[OOMHandler(), *compiling, *callbacks], limit_val_batches=0, **limits)
        trainer.fit(setup.model, datamodule=setup.datamodule)
        return setup.model, trainer

    def switches(self, case: Case) -> list[Variation]:
        """Precision, packing, workers, the size of micro-batches."""
        data, net = datamodule_of(case), case.module.net
        found = precision_of(case)
        assert net is not None
        if net.packed:  # type: ignore[union-attr]
            line = "model.attention: packed"
            found.append(Variation("padding", {"model.attention": "padded"}, True, "packed against padded", line))
        workers = 0 if case.trainer.train_dataloader.num_workers else 2  # type: ignore[union-attr]
        if (
            not workers or case.seen.seconds(FETCH, MOVE) > WORTH * case.seen.cycle_seconds
        ):  # else they can bring nothing
            line = f"data.batching.num_workers: {workers}"
            other = {"data.batching.num_workers": workers, "data.batching.persistent_workers": True}
            found.append(Variation("loader workers", other, False, f"{workers} workers against the choice", line))
        for name, tokens in sizes(case):
            line = f"data.batching.max_tokens: {tokens}"
            text = f"micro-batches of at most {tokens} tokens against {data.micro_batch_size}"
            found.append(Variation(name, {"data.batching.max_tokens": tokens}, False, text, line))
        return found

    def rows(self, case: Case) -> list[Row]:
        """Memory, the loader's choice, what a search keeps ready, and its pruner."""
        kept = [warm_encoder(self), tokenise_once(self)]
        memory = [dynamic_batch_size(case), *micro_batches(case), out_of_memory(self, case)]
        return [loader_workers(case), *memory, *kept, *search_rows(self.hpo, self.steps)]

    def fixed(self, case: Case) -> dict[str, Any]:
        """The size of micro-batches, so that none is looked for again."""
        return {"data.batching.max_tokens": datamodule_of(case).micro_batch_size}

    def gains(self, case: Case, config: AuditConfig) -> dict[str, Gain | str]:
        """Also what compiling would save, from one layer of a real batch."""
        found = super().gains(case, config)
        if self.compile.policy != "always" and config.compile_s:
            found |= self._compiling(case, config.compile_s)
        return found

    def _compiling(self, case: Case, time_limit: float) -> dict[str, Gain | str]:
        probe = CompileLayers(replace(self.compile, policy="auto", time_limit=time_limit), steps_left=FOREVER)
        self.run(self.fixed(case), [probe], {"limit_train_batches": PROBED, "max_epochs": 1})
        told = probe.describe()
        if told["saved_ms"] is None or not told["step_ms"]:
            return {"torch.compile": f"tried: {probe.reason}"}
        share = told["saved_ms"] / told["step_ms"]
        text = (
            f"one layer of a batch, replayed eager and compiled ({told['compile_s']:.0f} s to compile); {probe.reason}"
        )
        return {"torch.compile": Gain(min(0.0, share), share, max(0.0, share), "predicted", text)}


def datamodule_of(case: Case) -> TextDataModule:
    """The run's data module."""
    found = case.trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(found, TextDataModule)
    return found


def sizes(case: Case) -> list[tuple[str, int]]:
    """Micro-batch sizes worth a try: half a batch, and twice the one in effect where a batch needs more than one."""
    data = datamodule_of(case)
    tokens = round(median(batch.tokens or 0 for batch in case.seen.batches))
    half = max(data.micro_batch_size_step, min(tokens, data.micro_batch_size) // 2)
    found = [("smaller micro-batches", half)]
    return [*found, ("larger micro-batches", 2 * data.micro_batch_size)] if tokens > data.micro_batch_size else found


def dynamic_batch_size(case: Case) -> Row:
    """The size of a micro-batch, and how it was found."""
    data = datamodule_of(case)
    finders = [one for one in case.trainer.callbacks if isinstance(one, MicroBatchFinder)]  # type: ignore[attr-defined]
    why = finders[0].reason if finders and data.auto_micro_batch_size else "as data.batching.max_tokens says"
    return Row(
        "memory", "dynamic batch size", str(data.batching.max_tokens), f"{data.micro_batch_size} tokens", "ok", why
    )


def micro_batches(case: Case) -> list[Row]:
    """Rows for the sizes that are tried."""
    now = f"{datamodule_of(case).micro_batch_size} tokens"
    return [Row("memory", name, "not said", now, "ok", f"at most {tokens} tokens") for name, tokens in sizes(case)]


def loader_workers(case: Case) -> Row:
    """Who assembles batches, and why."""
    loader, asked = case.trainer.train_dataloader, datamodule_of(case).batching.num_workers
    assert isinstance(loader, BatchLoader)
    return Row("data", "loader workers", str(asked), str(loader.num_workers), "ok", loader.workers_reason)


def warm_encoder(own: OwnRun) -> Row:
    """Starting a fold from the encoder that is there, against reading the model anew."""
    seconds: dict[str, list[float]] = {"warm": [], "read": []}
    for _ in range(3):
        for kind, encoder in (("warm", own.encoder), ("read", EncoderCache())):
            setup = own.build({})
            setup.model.load_encoder_with(encoder.load)
            setup.model.schema = setup.datamodule.schema
            since = perf_counter()
            setup.model.configure_model()
            seconds[kind].append(perf_counter() - since)
    warm, read = (median(seconds[kind]) for kind in ("warm", "read"))
    text = (
        f"a fold's model is there after {warm * 1e3:.0f} ms, its weights put back; read anew after {read * 1e3:.0f} ms"
    )
    good = warm < read
    return Row("search", "warm encoder", "on", "yes" if good else "no", "ok" if good else "off", text)


def tokenise_once(own: OwnRun) -> Row:
    """Setting up the data of another trial reads what was tokenised."""
    since = perf_counter()
    data = own.build({}).datamodule
    spent = (perf_counter() - since) * 1e3
    text = f"the data of another trial ({data.num_train_rows} rows) are there after {spent:.0f} ms"
    return Row("search", "tokenise once", "on", "yes", "ok", text)


def out_of_memory(own: OwnRun, case: Case) -> Row:
    """Throw an out-of-memory error at the head of a step: does the step go on, and with all of its rows?"""
    fault = Fault()
    model, trainer = own.run(own.fixed(case), [fault], {"limit_train_batches": 2, "max_epochs": 1})
    assert isinstance(model, BGEClassifier)
    met = len(model.oom_retry.records)
    size = trainer.datamodule.micro_batch_size  # type: ignore[attr-defined]
    wanted = int(trainer.num_training_batches)  # an epoch may have one batch alone
    good = met == 1 and fault.steps == wanted
    return Row(
        "memory",
        "out of memory",
        "smaller micro-batches, same batch",
        "yes" if good else "no",
        "ok" if good else "lie",
        f"thrown once in a step of {fault.rows} rows: met {met} time(s), micro-batches of at most {size} "
        f"tokens since, {fault.steps} of {wanted} steps made",
    )


class Fault(Callback):
    """Throws an out-of-memory error in the first forward pass, once.

    Attributes:
        rows: of the batch it was thrown in.
        steps: optimizer steps that were made all the same.
    """

    def __init__(self) -> None:
        self.rows = self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the fault in."""
        if batch_idx:
            return
        self.rows = batch.size
        assert isinstance(pl_module, BGEClassifier)
        assert pl_module.net is not None

        def fail(*_: Any) -> None:
            hook.remove()
            raise torch.OutOfMemoryError("out of memory: thrown by the audit")

        hook = pl_module.net.register_forward_pre_hook(fail)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps."""
        self.steps = trainer.global_step
