"""Who trains in the GPU suite: ours with its switches, transformers' Trainer, sentence-transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from common import Job, build_trainer, describe_trainer
from gpu_parts import MAX_LENGTH, Bench, Case, Clock, labels_of, special_tokens
from lightning.pytorch import Callback
from measures import Run, model_shape
from peers import build_cross_encoder, tuned_options
from transformers import TrainerCallback

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig, Mode
from lightning_bge.data.batches.config import AUTO_MAX_TOKENS, BatchingConfig
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import EffectiveBatchSampler
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import Attention
from lightning_bge.trainer import quiet_trainer
from lightning_bge.types import Schema

Train = Callable[[Bench, Case, Clock], dict[str, Any]]  # trains until the clock has enough; returns its settings

# Ours


@dataclass(frozen=True)
class Ours:
    """lightning-bge's switches; the defaults are the product's on a GPU.

    `one_shape` lets every step train on the same rows: what CUDA graphs, one for each shape, could give at best.
    """

    precision: str = "bf16-mixed"
    attention: Attention = "auto"
    dropout: float = 0.1
    tokens: int = AUTO_MAX_TOKENS
    fused: bool = True
    tf32: bool = True
    compile: Mode | None = None
    one_shape: bool = False


class ForeachAdamW(BGEClassifier):
    """With torch's multi-tensor AdamW in place of the fused one."""

    def configure_optimizers(self) -> Any:
        optimizers, schedules = super().configure_optimizers()
        for group in optimizers[0].param_groups:
            group.update(fused=False, foreach=True)
        return optimizers, schedules


class LightningClock(Callback):
    """Drives a clock in Lightning, and ends the run when the clock has enough."""

    def __init__(self, clock: Clock, tf32: bool = True) -> None:
        self.clock, self.tf32 = clock, tf32

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.tf32:
            torch.set_float32_matmul_precision("highest")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.saw([length for micro in batch.micro for length in micro.lengths])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.clock.step():
            trainer.should_stop = True


class SameRows(EffectiveBatchSampler):
    """The same effective batch at every step."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([self.rows[: self.batch_size].tolist()] * len(self))


def loader_of(bench: Bench, case: Case, tokens: int, one_shape: bool = False) -> BatchLoader:
    """The product's training loader over generated rows."""
    rows = bench.rows(case)
    dataset = EncodedDataset(rows, labels_of(len(rows)), None, tokens)
    config = BatchingConfig(max_tokens=tokens)
    sampler = SameRows if one_shape else EffectiveBatchSampler
    return BatchLoader(dataset, sampler(np.arange(len(rows)), case.batch, config.seed), config)


def train_ours(bench: Bench, case: Case, clock: Clock, options: Ours) -> dict[str, Any]:
    """Train under Lightning's trainer as the product does; returns the configuration."""
    kind = BGEClassifier if options.fused else ForeachAdamW
    module = kind(bench.model_folder(case.model), attention=options.attention, dropout=options.dropout)
    module.set_schema(Schema("binary", ("no", "yes"), ("first", "second"), MAX_LENGTH))
    module.configure_model()
    assert module.net is not None
    callbacks: list[Callback] = [LightningClock(clock, options.tf32)]
    if options.compile:
        callbacks.append(CompileLayers(CompileConfig(policy="always", mode=options.compile)))
    settings = {"max_epochs": 1, "precision": options.precision, "accelerator": bench.device, "callbacks": callbacks}
    trainer = quiet_trainer(settings, limit_val_batches=0)
    trainer.fit(module, train_dataloaders=loader_of(bench, case, options.tokens, options.one_shape))
    return {
        **asdict(options),
        "attention": module.net.attention,
        "compile": callbacks[-1].reason if isinstance(callbacks[-1], CompileLayers) else None,
        "optimizer": asdict(module.optimizer_config),
        "schedule": asdict(module.schedule_config),
    }


# Peers


class TrainerClock(TrainerCallback):
    """Drives a clock in transformers' Trainer, and ends the run when the clock has enough."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock.step():
            control.should_training_stop = True


def count_in(collator: Any, clock: Clock, length: Callable[[Any], int]) -> None:
    """Let a collator tell the clock of what it collates; it stays an instance of its own class."""

    def call(self: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        clock.saw([length(feature) for feature in features])
        return type(collator).__mro__[1].__call__(self, features, *args, **kwargs)

    collator.__class__ = type("Counting", (type(collator),), {"__call__": call})


def job_of(bench: Bench, case: Case) -> Job:
    """The job as the shared benchmark code wants it: binary cross-entropy of one logit, as ours."""
    return Job(
        model=bench.model_folder(case.model),
        train_file="",
        task="binary",
        text_columns=("first", "second"),
        label_column="label",
        labels=("no", "yes"),
        device=bench.device,
        positive_weight=1.0,
        batch=case.batch,
        max_length=MAX_LENGTH,
    )


def train_trainer(bench: Bench, case: Case, clock: Clock, **options: Any) -> dict[str, Any]:
    """transformers' Trainer over the same token ids, in fp32 without TF32 unless told otherwise."""
    torch.set_float32_matmul_precision("highest")  # torch's default, which our trainer changes for the process
    rows = bench.rows(case)
    names = ["input_ids"] if rows.token_type_ids is None else ["input_ids", "token_type_ids"]
    features = []
    for number, (start, stop) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        feature = {name: getattr(rows, name)[start:stop].tolist() for name in names}
        features.append({**feature, "attention_mask": [1] * int(stop - start), "labels": number % 2})
    trainer = build_trainer(
        job_of(bench, case), features, str(bench.folder / "trainer"), [TrainerClock(clock)], **options
    )
    count_in(trainer.data_collator, clock, lambda feature: len(feature["input_ids"]))
    trainer.train()
    return describe_trainer(trainer)


def train_tuned(bench: Bench, case: Case, clock: Clock, accumulate: int, **options: Any) -> dict[str, Any]:
    """transformers' Trainer tuned by hand, its effective batch cut into `accumulate` micro-batches."""
    return train_trainer(bench, case, clock, **tuned_options(case.batch // accumulate, case.batch), **options)


def missing_for_cross_encoder() -> list[str]:
    """Packages that sentence-transformers' trainer needs and that are not installed."""
    return [name for name in ("sentence_transformers", "datasets", "accelerate") if find_spec(name) is None]


def texts_of(bench: Bench, case: Case) -> dict[str, list[str]]:
    """The rows as pairs of texts, which the model folder's tokenizer turns into the same ids again."""
    rows, separator = bench.rows(case), special_tokens(bench.shape(case.model)).index("[SEP]")
    texts: dict[str, list[str]] = {"first": [], "second": []}
    for start, stop in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids = rows.input_ids[start + 1 : stop - 1].tolist()
        cut = ids.index(separator)
        for name, part in (("first", ids[:cut]), ("second", ids[cut + 1 :])):
            texts[name].append(" ".join(f"w{number}" for number in part))
    return texts


def train_cross_encoder(bench: Bench, case: Case, clock: Clock) -> dict[str, Any]:
    """sentence-transformers with its defaults; it reads text, and tokenizes it during training."""
    torch.set_float32_matmul_precision("highest")
    texts = texts_of(bench, case)
    columns = {**texts, "label": labels_of(len(texts["first"])).tolist()}
    folder = str(bench.folder / "cross-encoder")
    trainer = build_cross_encoder(job_of(bench, case), columns, folder, [TrainerClock(clock)])
    count_in(trainer.data_collator, clock, lambda pair: sum(len(pair[name].split()) for name in texts) + 3)
    trainer.train()
    return {"tokenizes": "in the loop", "per_device_train_batch_size": case.batch}


def peers(tuned: tuple[int, ...]) -> dict[str, Train]:
    """The peers: transformers' Trainer with its defaults, and tuned with so many micro-batches a step each."""
    found: dict[str, Train] = {"Trainer": train_trainer}
    for accumulate in tuned:
        found[f"Trainer tuned, {accumulate} micro-batches"] = partial(train_tuned, accumulate=accumulate)
    return found


def run_once(
    bench: Bench,
    case: Case,
    train: Train,
    peak: float,
    around: AbstractContextManager[Any] | None = None,
) -> Run:
    """One run from fresh weights.

    Args:
        bench: device, models, and how much is timed.
        case: what is trained.
        train: the contender.
        peak: the device's measured FLOP/s.
        around: entered while steps are timed.

    Returns:
        `Clock.result`, the most memory allocated on the GPU (`peak_gib`), and the contender's settings (`config`).
    """
    gc.collect()
    before = 0
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = Clock(bench.limit, around)
    try:
        config = train(bench, case, clock)
    finally:
        clock.close()
    shape = model_shape(bench.model_folder(case.model))
    result = clock.result(shape, peak, config.get("gradient_accumulation_steps", 1))
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if bench.device == "cuda" else None
    return {**result, "peak_gib": memory, "config": config}
