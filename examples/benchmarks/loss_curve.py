"""Are the losses right? Ours in fp32, packed, against a plain padded fp32 loop over transformers' model.

Both sides see the same effective batches and start from the same weights, without dropout. The plain loop pads the
whole batch, gives the model an attention mask, and uses torch's AdamW, transformers' linear schedule and
`clip_grad_norm_`; of ours it takes the batches' token ids and the initial weights, nothing else.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from common import Job, build_ours
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from transformers import AutoConfig, AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from lightning_bge.types import Batch

LIMIT = 1e-4


class Losses(Logger):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    name = version = "losses"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train_loss_step" in metrics:
            self.values.append(float(metrics["train_loss_step"]))


class Batches(Callback):
    """Keeps the batches, and the weights before the first step."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = {name: value.clone().cpu() for name, value in pl_module.net.model.state_dict().items()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch.to("cpu"))


def our_losses(job: Job, steps: int) -> tuple[list[float], Batches, dict[str, Any]]:
    losses, batches = Losses(), Batches()
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "logger": losses, "log_every_n_steps": 1}
        trainer, module, data = build_ours(job, folder, "32-true", [batches], dropout=0.0, **options)
        assert module.net is not None
        trainer.fit(module, datamodule=data)
        config = {"attention": module.net.attention, "batching": asdict(data.batching), "dropout": 0.0}
    return losses.values, batches, config


def pad(batch: Batch, padding: int) -> dict[str, torch.Tensor]:
    """The whole effective batch as one padded batch, in the order of its micro-batches."""

    def padded(field: str, value: int) -> torch.Tensor:
        rows = [part for micro in batch.micro for part in getattr(micro, field).split(micro.lengths)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = padded("input_ids", padding)
    lengths = torch.tensor([length for micro in batch.micro for length in micro.lengths])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    if batch.micro[0].token_type_ids is not None:
        inputs["token_type_ids"] = padded("token_type_ids", 0)
    return inputs


def plain_losses(job: Job, batches: Batches) -> list[float]:
    config = AutoConfig.from_pretrained(job.model, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.load_state_dict(batches.weights)
    model = model.to(job.device).eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches.batches))
    losses = []
    for batch in batches.batches:
        inputs = {name: value.to(job.device) for name, value in pad(batch, config.pad_token_id or 0).items()}
        assert batch.labels is not None
        logits = model(**inputs).logits.squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels.to(job.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def compare_losses(job: Job, steps: int) -> dict[str, Any]:
    """Both curves over so many optimizer steps, and the largest absolute difference.

    Raises:
        RuntimeError: there are not as many losses as steps.
    """
    rows = job.rows or len(job.read(job.train_file).texts)
    job = replace(job, epochs=math.ceil(steps / math.ceil(rows / job.batch)))
    ours, batches, config = our_losses(job, steps)
    plain = plain_losses(job, batches)
    if not len(ours) == len(plain) == steps:
        raise RuntimeError(f"{len(ours)} and {len(plain)} losses for {steps} steps")
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    found = {"steps": steps, "largest_difference": difference, "limit": LIMIT, "within_limit": difference <= LIMIT}
    return {**found, "epochs": job.epochs, "config": config, "lightning-bge fp32": ours, "plain fp32 loop": plain}
