"""An audit of this package's own runs: each optimization is an option here, so that more can be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.audit.ablation import Ablation
from lightning_bge.advisor.audit.audit import Audit, audit_run
from lightning_bge.advisor.audit.bottleneck import MIN_SAVING
from lightning_bge.advisor.audit.checks.row import NOT_STATED, ObservedRun, Row, TimeSaved
from lightning_bge.advisor.audit.checks.search import search_rows
from lightning_bge.advisor.audit.config import AuditConfig
from lightning_bge.advisor.audit.observation import FETCH, MOVE
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.requested import Requested
from lightning_bge.advisor.audit.training_run import TrainingRun, precision_ablation
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.objective import TrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache

PROBED = 16  # batches in which `CompileLayers` can warm up, time steps, and probe a layer
ENDLESS = 10**9  # steps: what compiling saves of a step is asked, not whether it pays in a training of some length


def audit_bge_run(run: BGERun, config: AuditConfig) -> Audit:
    """Audit a run of this package: as `audit`, with its options switched on and off.

    Args:
        run: the run.
        config: how much is measured.
    """
    compiled = run.compile.policy == "always" or None
    batch_size = run.build({}).datamodule.batch_size
    return audit_run(run, Requested(effective_batch=batch_size, compile=compiled), config)


@dataclass(frozen=True)
class BGERun(TrainingRun):
    """A run of this package.

    Args:
        build: makes fresh objects from options by their dotted names.
        hpo: the options of the search.
        steps: that its trials report.
        compile: when layers are compiled.
        encoder: loads the encoder once for all runs.
    """

    build: Callable[[dict[str, Any]], TrialSetup]
    hpo: StudyConfig
    steps: Steps
    compile: CompileConfig
    encoder: EncoderCache = field(default_factory=EncoderCache)

    def run(
        self, options: dict[str, Any], observer: StepObserver | None, limits: dict[str, Any]
    ) -> tuple[LightningModule, Trainer]:
        """Train as a trial of a search does."""
        return self._train(options, observer, limits, CompileLayers(self.compile))

    def _train(
        self, options: dict[str, Any], observer: StepObserver | None, limits: dict[str, Any], compiling: CompileLayers
    ) -> tuple[LightningModule, Trainer]:
        setup = self.build(options)
        setup.model.load_encoder_with(self.encoder.load)
        callbacks: list[Callback] = [OOMHandler(), compiling]
        if observer is not None:
            callbacks, limits = [*callbacks, observer], {**limits, "profiler": observer.profiler}
        trainer = setup.make_trainer(callbacks=callbacks, limit_val_batches=0, **limits)
        trainer.fit(setup.model, datamodule=setup.datamodule)
        return setup.model, trainer

    def ablations(self, run: ObservedRun) -> list[Ablation]:
        """Precision, packing, workers, the size of micro-batches."""
        data, model = datamodule_of(run), run.module
        assert isinstance(model, BGEClassifier)
        assert model.net is not None
        found = precision_ablation(run)
        if model.net.packed:
            padded = {"model.attention": "padded"}
            found.append(Ablation("padding", padded, True, "packed against padded", "model.attention: packed"))
        workers = 0 if loader_of(run).num_workers else 2
        # more workers can save nothing where no batch is waited for
        if not workers or run.seen.seconds(FETCH, MOVE) > MIN_SAVING * run.seen.cycle_seconds:
            options = {"data.batching.num_workers": workers, "data.batching.persistent_workers": True}
            text = f"{workers} workers against {loader_of(run).num_workers}"
            line = f"data.batching.num_workers: {workers}"
            found.append(Ablation("loader workers", options, False, text, line))
        for name, tokens in other_sizes(run):
            text = f"micro-batches of at most {tokens} tokens against {data.micro_batch_size}"
            line = f"data.batching.max_tokens: {tokens}"
            found.append(Ablation(name, {"data.batching.max_tokens": tokens}, False, text, line))
        return found

    def rows(self, run: ObservedRun) -> list[Row]:
        """The loader's workers, memory, what a search keeps for its next trial, and its pruner."""
        data = [loader_workers(run), tokenized_once(self)]
        memory = [dynamic_batch_size(run), *micro_batch_sizes(run), oom_retry(run)]
        return [*data, *memory, encoder_cache(self, run), *search_rows(self.hpo, self.steps)]

    def fixed_options(self, run: ObservedRun) -> dict[str, Any]:
        """The size of micro-batches, so that it is not searched for in each run."""
        return {"data.batching.max_tokens": datamodule_of(run).micro_batch_size}

    def savings(self, run: ObservedRun, config: AuditConfig) -> dict[str, TimeSaved | str]:
        """Also what compiling would save, from one layer of a real batch."""
        found = super().savings(run, config)
        if self.compile.policy != "always" and config.compile_time_limit:
            found["torch.compile"] = self._compile_saving(run, config.compile_time_limit)
        return found

    def _compile_saving(self, run: ObservedRun, time_limit: float) -> TimeSaved | str:
        probe = CompileLayers(replace(self.compile, policy="auto", time_limit=time_limit), steps_left=ENDLESS)
        self._train(self.fixed_options(run), None, {"limit_train_batches": PROBED, "max_epochs": 1}, probe)
        found = probe.found
        if found.measured is None or not found.step_s:
            return f"a trial on one layer gave no figure ({probe.reason})"
        share = found.saved_s / found.step_s
        seconds = found.measured.compile_s
        text = f"one layer of a batch, run eager and compiled ({seconds:.0f} s to compile); {probe.reason}"
        return TimeSaved(min(0.0, share), share, max(0.0, share), "predicted", text)


def datamodule_of(run: ObservedRun) -> TextDataModule:
    """The run's data module."""
    found = run.trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(found, TextDataModule)
    return found


def loader_of(run: ObservedRun) -> BatchLoader:
    """The run's training loader."""
    found = run.trainer.train_dataloader
    assert isinstance(found, BatchLoader)
    return found


def other_sizes(run: ObservedRun) -> list[tuple[str, int]]:
    """Micro-batch sizes to try: half a batch, and twice the present size where a batch needs more than one."""
    data = datamodule_of(run)
    tokens = round(median(batch.tokens or 0 for batch in run.seen.batches))
    half = max(data.micro_batch_size_step, min(tokens, data.micro_batch_size) // 2)
    found = [("smaller micro-batches", half)]
    return [*found, ("larger micro-batches", 2 * data.micro_batch_size)] if tokens > data.micro_batch_size else found


def loader_workers(run: ObservedRun) -> Row:
    """How many workers assemble batches, and why."""
    loader = loader_of(run)
    asked = str(datamodule_of(run).batching.num_workers)
    return Row("data", "loader workers", asked, str(loader.num_workers), "ok", loader.workers_reason)


def tokenized_once(run: BGERun) -> Row:
    """The data of another trial are read from the cache of token ids."""
    since = perf_counter()
    data = run.build({}).datamodule
    text = f"the data of another trial ({data.num_train_rows} rows) were ready after {perf_counter() - since:.2f} s"
    return Row("data", "tokenized once", "on", "yes", "ok", text)


def dynamic_batch_size(run: ObservedRun) -> Row:
    """The size of a micro-batch, and how it was found."""
    data = datamodule_of(run)
    finders = [one for one in run.trainer.callbacks if isinstance(one, MicroBatchFinder)]  # type: ignore[attr-defined]
    why = finders[0].reason if finders and data.auto_micro_batch_size else "set by data.batching.max_tokens"
    size = f"{data.micro_batch_size} tokens"
    return Row("memory", "dynamic batch size", str(data.batching.max_tokens), size, "ok", why)


def micro_batch_sizes(run: ObservedRun) -> list[Row]:
    """A row for each size that is tried."""
    now = f"{datamodule_of(run).micro_batch_size} tokens"
    return [
        Row("memory", name, NOT_STATED, now, "ok", f"the alternative is at most {tokens} tokens")
        for name, tokens in other_sizes(run)
    ]


def oom_retry(run: ObservedRun) -> Row:
    """A step that runs out of memory is repeated with smaller micro-batches."""
    assert isinstance(run.module, BGEClassifier)
    count = len(run.module.oom_retry.records)
    text = f"{count} steps ran out of memory and were repeated" if count else "no observed step ran out of memory"
    return Row("memory", "out-of-memory retry", "smaller micro-batches, same effective batch", "on", "ok", text)


def encoder_cache(run: BGERun, observed: ObservedRun) -> Row:
    """Another training run gets the encoder from memory, with its first weights restored."""
    before = run.encoder.loads
    run.run(run.fixed_options(observed), None, {"limit_train_batches": 1, "max_epochs": 1})
    if run.encoder.loads == before:
        text = "another training run started without reading the encoder from disk"
        return Row("search", "encoder cache", "on", "yes", "ok", text)
    return Row("search", "encoder cache", "on", "no", "improve", "another training run read the encoder from disk")
