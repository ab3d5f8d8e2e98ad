"""The peers, as their own documentation shows them: Trainer, sentence-transformers, textbook Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import Job, build_trainer, describe_trainer, encode, training_arguments
from measures import Clock, LightningClock, Run, TransformersClock, timed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers import Trainer as TransformersTrainer

Rows = list[dict[str, Any]]
BATCH = 32  # rows of an effective batch in every benchmark on RTE
SIZES = (4, 8, 16, 32)  # per-device batches of the tuned Trainer, accumulated to the effective batch


def tuned_options(size: int, batch: int) -> dict[str, Any]:
    """The Trainer's options after tuning by hand: bf16, batches of like lengths, micro-batches, fused AdamW."""
    return {
        "bf16": True,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": batch // size,
    }


def dtype_of(options: dict[str, Any]) -> str:
    return "bf16" if options.get("bf16") else "fp32"


def counted_rows(job: Job, clock: Clock) -> Rows:
    """The training rows as token ids, counted by the clock."""
    rows = encode(job, job.read(job.train_file, job.rows))
    clock.count([len(row["input_ids"]) for row in rows])
    return rows


def train_trainer(job: Job, folder: str, **options: Any) -> Run:
    clock = Clock()
    trainer = build_trainer(job, counted_rows(job, clock), folder, [TransformersClock(clock)], **options)
    return timed(clock, trainer.train, describe_trainer(trainer), dtype_of(options))


def train_tuned(job: Job, folder: str, size: int) -> Run:
    return train_trainer(job, folder, **tuned_options(size, job.batch))


def build_cross_encoder(
    job: Job, columns: dict[str, Any], folder: str, callbacks: Sequence[TrainerCallback], **options: Any
) -> TransformersTrainer:
    """sentence-transformers' trainer as its training overview shows it; it tokenizes in the collator.

    Args:
        job: model and settings.
        columns: two with text, then `label`.
        folder: the trainer's output folder; nothing is saved.
        callbacks: see transformers' `Trainer`.
        **options: for `CrossEncoderTrainingArguments`.
    """
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    set_seed(job.seed)
    model = CrossEncoder(job.model, num_labels=1, max_length=job.max_length, device=job.device)
    return CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**training_arguments(job, folder, **options)),
        train_dataset=Dataset.from_dict(columns),
        loss=BinaryCrossEntropyLoss(model),
        callbacks=list(callbacks),
    )


def train_cross_encoder(job: Job, folder: str, **options: Any) -> Run:
    clock = Clock()
    labels = [float(row["labels"]) for row in counted_rows(job, clock)]
    first, second = zip(*job.read(job.train_file, job.rows).texts, strict=True)
    columns = {"premise": first, "hypothesis": second, "label": labels}
    trainer = build_cross_encoder(job, columns, folder, [TransformersClock(clock)], **options)
    config = {"max_length": trainer.model.max_seq_length, "tokenizes": "in the loop", "bf16": trainer.args.bf16}
    return timed(clock, trainer.train, config, dtype_of(options))


class TextbookClassifier(L.LightningModule):
    """A classifier as Lightning's and transformers' guides write it: automatic optimization, padded batches, AdamW.

    The encoder is put into train mode by hand, which the guides forget: `from_pretrained` returns eval mode and
    Lightning leaves it, so that dropout, which all contenders have, would be silently off.

    Args:
        model: folder with the weights.
        lr: peak learning rate; linear to 0.
        weight_decay: of all parameters.
        warmup: share of the steps before the peak.
    """

    def __init__(self, model: str, lr: float, weight_decay: float = 0.0, warmup: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, dtype=torch.float32)

    def on_fit_start(self) -> None:
        self.model.train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def on_validation_epoch_start(self) -> None:
        self.right = self.seen = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        found = self.model(**batch).logits.argmax(-1)
        self.right += int((found == batch["labels"]).sum())
        self.seen += len(found)

    def on_validation_epoch_end(self) -> None:
        self.log("val_accuracy", self.right / self.seen)

    def configure_optimizers(self) -> Any:
        chosen = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(chosen.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(job: Job, rows: Rows, shuffle: bool) -> DataLoader:
    """Batches of the effective size, padded to their longest row."""
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.model))
    return DataLoader(rows, batch_size=job.batch, shuffle=shuffle, collate_fn=collate)


def textbook_trainer(job: Job, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer in fp32, clipping as the Trainer of transformers does; it writes and shows nothing."""
    return L.Trainer(
        max_epochs=job.epochs,
        precision="32-true",
        accelerator=job.device,
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def train_textbook(job: Job, folder: str) -> Run:
    clock = Clock()
    rows = counted_rows(job, clock)
    L.seed_everything(job.seed, verbose=False)
    module = TextbookClassifier(job.model, job.lr)
    trainer = textbook_trainer(job, [LightningClock(clock)])
    config = {
        "precision": trainer.precision,
        "batch_size": job.batch,
        "optimizer": "torch.optim.AdamW, default arguments, weight decay 0",
        "gradient_clip_val": trainer.gradient_clip_val,
        "dropout": "on: .train() is called",
        "attention": module.model.config._attn_implementation,
    }
    return timed(clock, lambda: trainer.fit(module, loader(job, rows, shuffle=True)), config, "fp32")


def run_flagembedding(job: Job, warmup_rows: int, python: str) -> Run:
    """FlagEmbedding's reranker, by an interpreter that has it; transformers' other peers may need other versions.

    Args:
        job: what is trained.
        warmup_rows: rows of the untimed run before.
        python: the interpreter.

    Raises:
        RuntimeError: it failed; the end of its messages is told.
    """
    script = Path(__file__).with_name("flagembedding_run.py")
    table = job.read(job.train_file, job.rows)
    given = {"job": asdict(job), "pairs": table.texts, "warmup_rows": warmup_rows}
    text = json.dumps(given)
    found = subprocess.run([python, str(script)], input=text, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"FlagEmbedding by {python} failed:\n{found.stderr[-2000:]}")
    sys.stderr.write(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


TRAINER: dict[str, Callable[[Job, str], Run]] = {
    "Trainer": train_trainer,
    "Trainer bf16": partial(train_trainer, bf16=True),
}
CROSS_ENCODER: dict[str, Callable[[Job, str], Run]] = {
    "CrossEncoderTrainer": train_cross_encoder,
    "CrossEncoderTrainer bf16": partial(train_cross_encoder, bf16=True),
}
TEXTBOOK: dict[str, Callable[[Job, str], Run]] = {"textbook Lightning": train_textbook}
