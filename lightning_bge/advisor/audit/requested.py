"""What a training run is said to do: by its settings, its objects' flags, and the user's own word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_bge.advisor.audit.observe import Observation

# Names of hyper-parameters that claim something, in the projects of others.
SAYS_NOTHING = re.compile(r"^(no|not|disable|skip)_|_(mode|backend|dir|path)$")
WORDS = {
    "bf16": re.compile(r"bf16|bfloat16"),
    "tf32": re.compile(r"tf32"),
    "fused": re.compile(r"fused"),
    "compile": re.compile(r"compile"),
    "effective_batch": re.compile(r"(effective|target|total|global)_?(train_)?batch(_?size)?$"),
}


@dataclass(frozen=True)
class Claims:
    """What a run is said to do. None: not said.

    Attributes:
        bf16: matrices are multiplied in bf16.
        tf32: fp32 matrices are multiplied in TF32.
        fused: the optimizer's fused kernel runs.
        compile: the model is compiled.
        sdpa: attention is a fused kernel (SDPA, flash, packed), its scores are not written out.
        dropout: dropout drops.
        effective_batch: rows that one optimizer step sees.
        persistent: the loader's workers live on from epoch to epoch.
        pinned: batches come in page-locked memory.
    """

    bf16: bool | None = None
    tf32: bool | None = None
    fused: bool | None = None
    compile: bool | None = None
    sdpa: bool | None = None
    dropout: bool | None = None
    effective_batch: int | None = None
    persistent: bool | None = None
    pinned: bool | None = None

    def over(self, other: Claims) -> Claims:
        """These, and where nothing is said, the other's."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Claims(**{name: getattr(other, name) if value is None else value for name, value in own.items()})


def claims_of(module: LightningModule, trainer: Trainer, seen: Observation, devices: int = 1) -> Claims:
    """What the objects of a run that has trained say they do: their flags, and names of the module's `hparams`.

    `effective_batch` is the loader's batch size times `accumulate_grad_batches` and devices, where the module names no
    other and the first batch had as many rows: what a loader counts may be questions with several answers each.
    """
    said = _words(dict(module.hparams))
    loader = trainer.train_dataloader
    workers = getattr(loader, "num_workers", 0)
    size = getattr(loader, "batch_size", None)
    plain = module.automatic_optimization and seen.batches and seen.batches[0].rows == size
    accumulated = size * trainer.accumulate_grad_batches * devices if size and plain else None
    return Claims(
        bf16=_true("bf16" in str(trainer.precision), said.get("bf16")),
        tf32=_true(torch.cuda.is_available() and seen.fp32 == "tf32", said.get("tf32")),
        fused=_true(any(optimizer.defaults.get("fused") for optimizer in trainer.optimizers), said.get("fused")),
        compile=_true(any(is_compiled(part) for part in module.modules()), said.get("compile")),
        sdpa=_attention(module),
        dropout=any(rate > 0 for rate in dropout_rates(module)) or None,
        effective_batch=said.get("effective_batch") or accumulated,
        persistent=bool(getattr(loader, "persistent_workers", False)) if workers else None,
        pinned=bool(getattr(loader, "pin_memory", False)) if trainer.strategy.root_device.type == "cuda" else None,
    )


def is_compiled(part: nn.Module) -> bool:
    """Whether a module was given to torch.compile, in place or as a whole."""
    return part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"


def dropout_rates(module: nn.Module) -> Iterator[float]:
    """The probability of each dropout module."""
    return (float(part.p) for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd))


def transformer_of(module: nn.Module) -> Any | None:
    """The first transformers model within a module; None: there is none."""
    return next((part for part in module.modules() if hasattr(part, "set_attn_implementation")), None)


def _attention(module: nn.Module) -> bool | None:
    model = transformer_of(module)
    implementation = None if model is None else getattr(model.config, "_attn_implementation", None)
    return None if implementation is None else implementation != "eager"


def _true(*values: Any) -> bool | None:
    return True if any(values) else None


def _words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The claims among (nested) settings."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _words(value)
            continue
        if SAYS_NOTHING.search(str(name).lower()):
            continue
        for claim, pattern in WORDS.items():
            if not pattern.search(str(name).lower()) and not (claim == "bf16" and "bf16" in str(value).lower()):
                continue
            if claim == "effective_batch":
                if isinstance(value, int) and not isinstance(value, bool):
                    found[claim] = value
            elif value and str(value).lower() not in ("false", "off", "never", "no", "none", "auto"):
                found[claim] = True
    return found
