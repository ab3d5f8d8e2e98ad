"""An audit of this package's own runs: each optimization is an option here, so that more can be measured."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.audit.ablation import Ablation, precision_ablation
from lightning_bge.advisor.audit.audit import Additions, audit_run
from lightning_bge.advisor.audit.checks_search import search_rows
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.requested import ObservedRun, Requested
from lightning_bge.advisor.audit.result import Audit, AuditConfig, Row, TimeSaved
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache

PROBED = 16  # batches in which `CompileLayers` can warm up, time steps, and probe a layer
ENDLESS = 10**9  # steps: what compiling saves of a step is asked, not whether it pays in a training of some length


@dataclass(frozen=True)
class BGERun:
    """A run of this package.

    Args:
        build: makes fresh objects from options by their dotted names.
        hpo: the options of the search.
        steps: that its trials report.
        compile: when layers are compiled.
        encoder: loads the encoder once for all runs.
    """

    build: Callable[[dict[str, Any]], TextTrialSetup]
    hpo: StudyConfig
    steps: Steps
    compile: CompileConfig
    encoder: EncoderCache = field(default_factory=EncoderCache)

    def train(
        self,
        options: dict[str, Any],
        observer: StepObserver | None,
        limits: dict[str, Any],
        compiling: CompileLayers | None = None,
    ) -> tuple[LightningModule, Trainer]:
        """Train as a trial of a search does, as `Run` of `repeat` is defined; `compiling` replaces the callback."""
        setup = self.build(options)
        setup.model.load_encoder_with(self.encoder.load)
        callbacks: list[Callback] = [OOMHandler(), compiling or CompileLayers(self.compile)]
        if observer is not None:
            callbacks, limits = [*callbacks, observer], {**limits, "profiler": observer.profiler}
        trainer = setup.make_trainer(callbacks=callbacks, limit_val_batches=0, **limits)
        trainer.fit(setup.model, datamodule=setup.datamodule)
        return setup.model, trainer


def audit_bge_run(run: BGERun, config: AuditConfig) -> Audit:
    """Audit a run of this package: as `audit`, with its options switched on and off.

    Args:
        run: the run.
        config: how much is measured.
    """

    def additions(observed: ObservedRun) -> Additions:
        data, model = observed.trainer.datamodule, observed.module  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule)
        assert isinstance(model, BGEClassifier)
        assert model.net is not None
        ablations = precision_ablation(observed)
        if model.net.packed:
            padded = {"model.attention": "padded"}
            ablations.append(Ablation("padding", padded, True, "packed against padded", "model.attention: packed"))
        fixed = {"data.batching.max_tokens": data.micro_batch_size}  # it is not searched for in each run
        savings: dict[str, TimeSaved | str] = {}
        if config.rounds and run.compile.policy != "always" and config.compile_time_limit:
            savings["torch.compile"] = _compile_saving(run, fixed, config.compile_time_limit)
        rows = [*_own_rows(observed.trainer, data, model), *search_rows(run.hpo, run.steps)]
        return Additions(rows, ablations, fixed, savings)

    requested = Requested(
        effective_batch=run.build({}).datamodule.rows_per_step, compile=run.compile.policy == "always" or None
    )
    return audit_run(run.train, requested, config, additions=additions)


def _own_rows(trainer: Trainer, data: TextDataModule, model: BGEClassifier) -> list[Row]:
    """The loader's workers and why; the size of a micro-batch, and how it was found; steps that ran out of memory."""
    loader, callbacks = trainer.train_dataloader, trainer.callbacks  # type: ignore[attr-defined]
    assert isinstance(loader, BatchLoader)
    asked, reason = str(data.batching.num_workers), loader.workers_reason
    workers = Row("data", "loader workers", asked, str(loader.num_workers), "ok", reason)
    finders = [one for one in callbacks if isinstance(one, MicroBatchFinder)]
    reason = finders[0].reason if finders and data.auto_micro_batch_size else "set by data.batching.max_tokens"
    asked, size = str(data.batching.max_tokens), f"{data.micro_batch_size} tokens"
    micro_batch = Row("memory", "dynamic batch size", asked, size, "ok", reason)
    count = len(model.oom_retry.records)
    text = f"{count} steps ran out of memory and were repeated" if count else "no observed step ran out of memory"
    retry = Row("memory", "out-of-memory retry", "smaller micro-batches, same effective batch", "on", "ok", text)
    return [workers, micro_batch, retry]


def _compile_saving(run: BGERun, fixed: dict[str, Any], time_limit: float) -> TimeSaved | str:
    """What compiling would save of a step, from one layer of a real batch; a text: why that is not known."""
    probe = CompileLayers(replace(run.compile, policy="auto", time_limit=time_limit), steps_left=ENDLESS)
    run.train(fixed, None, {"limit_train_batches": PROBED, "max_epochs": 1}, probe)
    found = probe.found
    if found.measured is None or not found.step_s:
        return f"a trial on one layer gave no figure ({probe.reason})"
    share, seconds = found.saved_s / found.step_s, found.measured.compile_s
    text = f"one layer of a batch, run eager and compiled ({seconds:.0f} s to compile); {probe.reason}"
    return TimeSaved(min(0.0, share), share, max(0.0, share), "predicted", text)
