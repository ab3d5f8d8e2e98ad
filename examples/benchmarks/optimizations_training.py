"""Seconds of a short training, with each optimization as a named switch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Job, encode
from lightning.pytorch import Callback
from measures import wait_for_device
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.torch_backends import TorchBackends, choose_precision
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.trainer import quiet_trainer

BACKEND = "inductor"
TRIED = (4, 13)  # pairs a step and steps of the training in which compiling is tried: it begins after the twelfth
EPOCHS = 2  # of a training whose workers may be kept
AdamWFlags = dict[str, bool]
LOOP, FOREACH = {"fused": False, "foreach": False}, {"fused": False, "foreach": True}


@dataclass(frozen=True)
class ShortTraining:
    """A short training, the same on both sides of an optimization.

    Attributes:
        job: model, rows to draw from, pairs of an effective batch.
        cache: folder for token ids.
        steps: timed optimizer steps.
        warmup: steps before them.
        compile_limit: the most seconds that compiling one layer may take.
    """

    job: Job
    cache: str
    steps: int
    warmup: int = 1
    compile_limit: float = 120.0

    @property
    def precision(self) -> str:
        """The fastest precision of this machine, used in all rows that do not compare precisions."""
        return choose_precision(self.job.device)[0]

    def of(self, batch: int, steps: int) -> ShortTraining:
        """The same with another number of pairs per step and of timed steps."""
        return replace(self, job=replace(self.job, batch=batch), steps=steps)


class FillsZeros(AdamW):
    """AdamW as before `set_to_none`: gradients are kept and filled with zeros."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


class Switched(BGEClassifier):
    """The classifier with an AdamW of another implementation.

    Args:
        adamw: flags of its parameter groups.
        fill_zeros: fill gradients with zeros instead of freeing them.
    """

    def __init__(self, adamw: AdamWFlags | None, fill_zeros: bool, **options: Any) -> None:
        super().__init__(**options)
        self.adamw, self.fill_zeros = adamw, fill_zeros

    def configure_optimizers(self) -> Any:
        [optimizer], schedules = super().configure_optimizers()
        for group in optimizer.param_groups:
            group.update(self.adamw or {})
        if self.fill_zeros:
            optimizer.__class__ = FillsZeros
        return [optimizer], schedules


class Seconds(Callback):
    """Seconds from a training's start, or from the step after the warm-up, to the last step's end."""

    def __init__(self, warmup: int | None) -> None:
        self.warmup, self.since, self.seconds = warmup, 0.0, 0.0

    def start(self) -> None:
        wait_for_device()
        self.since = time.perf_counter()

    def on_train_start(self, *_: Any) -> None:
        if self.warmup is None:
            self.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.warmup:
            self.start()

    def on_train_end(self, *_: Any) -> None:
        wait_for_device()
        self.seconds = time.perf_counter() - self.since


def fit(
    training: ShortTraining,
    clock: Seconds,
    callbacks: Sequence[Callback] = (),
    precision: str | None = None,
    attention: Any = "auto",
    batching: dict[str, Any] | None = None,
    adamw: AdamWFlags | None = None,
    fill_zeros: bool = False,
    epochs: int = 1,
) -> float:
    """Train with these switches and defaults otherwise, and return the seconds of `clock`."""
    job = training.job
    data = TextDataModule(
        tokenizer=job.model,
        train_file=job.train_file,
        text_columns=job.text_columns,
        label_column=job.label_column,
        max_length=job.max_length,
        batch_size=job.batch,
        cache_dir=training.cache,
        table=TableConfig(max_rows=job.rows, labels=job.labels),
        batching=BatchingConfig(seed=job.seed, **(batching or {})),
    )
    data.setup("fit")
    data.select_fold(None)
    module = Switched(adamw, fill_zeros, name_or_path=job.model, attention=attention, seed=job.seed)
    settings = {"precision": precision or training.precision, "accelerator": job.device, "limit_val_batches": 0}
    limits = {"max_epochs": epochs, "limit_train_batches": training.warmup + training.steps}
    trainer = quiet_trainer(settings, **limits, callbacks=[*callbacks, clock])
    trainer.fit(module, datamodule=data)
    return clock.seconds


def step(training: ShortTraining, tf32: Any = "auto", cudnn_benchmark: bool | None = None, **switches: Any) -> float:
    """Seconds of an optimizer step."""
    backends = TorchBackends(tf32=tf32, cudnn_benchmark=cudnn_benchmark)
    return fit(training, Seconds(training.warmup), [backends], **switches) / training.steps


def slow_step(training: ShortTraining, **switches: Any) -> float:
    """Seconds of a step; without bf16 units of 2 pairs only, as emulated bf16 is slow."""
    few = training.of(2, 1) if training.precision == "32-true" else training
    return step(few, **switches)


def compiled_step(training: ShortTraining, policy: Any, mode: Any = "default") -> float:
    """Seconds of a step with the layers compiled, or not."""
    config = CompileConfig(policy, mode, training.compile_limit, BACKEND)
    return fit(training, Seconds(training.warmup), [CompileLayers(config)]) / training.steps


def try_compiling(training: ShortTraining, mode: Any = "default") -> str | None:
    """Compile a layer within the limit, whose graph later fits reuse. Returns why that failed, or None."""
    attempt = CompileLayers(CompileConfig("auto", mode, training.compile_limit, BACKEND), steps_left=10**9)
    fit(training.of(*TRIED), Seconds(None), [attempt])
    return attempt.reason if attempt.found.measured is None else None


def worker_epoch(training: ShortTraining, persistent: bool) -> float:
    """Seconds of an epoch whose batches one worker assembles, with the start of the worker, once or in each epoch."""
    batching = {"num_workers": 1, "persistent_workers": persistent}
    return fit(training, Seconds(None), batching=batching, epochs=EPOCHS) / EPOCHS


def plain_step(training: ShortTraining, attention: str) -> float:
    """Seconds of a step of transformers' own padded model with this attention, in a bare loop."""
    job, device = training.job, training.job.device
    set_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=len(job.labels), attn_implementation=attention, dtype=torch.float32
    )
    model.to(device).train()
    rows, collate = (
        encode(job, job.read(job.train_file, job.rows)),
        DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.model)),
    )
    optimizer = AdamW(model.parameters(), lr=job.lr, fused=True)
    since = 0.0
    for number in range(training.warmup + training.steps):
        if number == training.warmup:
            wait_for_device()
            since = time.perf_counter()
        batch = collate(rows[number * job.batch : (number + 1) * job.batch]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16-mixed"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for_device()
    return (time.perf_counter() - since) / training.steps
