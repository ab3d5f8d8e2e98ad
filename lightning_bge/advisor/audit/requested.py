"""What a training run is configured to do, by its objects, hyperparameters and the user, beside what was observed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_bge.advisor.audit.observation import Observation
from lightning_bge.advisor.audit.result import NOT_STATED
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.runtime.compat.torch import compiled_call
from lightning_bge.runtime.compat.transformers import attention_implementation

# Names of hyperparameters that ask for an optimization, as they are common in other projects.
PATTERNS = {
    "bf16": re.compile(r"bf16|bfloat16"),
    "fp16": re.compile(r"(?<!b)f(p|loat)16"),
    "tf32": re.compile(r"tf32"),
    "fused": re.compile(r"fused"),
    "compile": re.compile(r"compile"),
    "effective_batch": re.compile(r"(effective|target|total|global)_?(train_)?batch(_?size)?$"),
}
NO_REQUEST = re.compile(r"^(no|not|disable|skip)_|_(mode|backend|dir|path)$")
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Requested:
    """What a run is configured to do. None: not stated.

    Attributes:
        bf16: matrices are multiplied in bf16.
        fp16: matrices are multiplied in fp16.
        tf32: fp32 matrices are multiplied in TF32.
        fused: the optimizer's fused kernel runs.
        compile: the model is compiled.
        sdpa: attention is a fused kernel (SDPA, flash, packed); its scores are not stored as a tensor.
        dropout: dropout is active.
        effective_batch: rows in one optimizer step.
        persistent_workers: the loader's workers live from one epoch to the next.
        pin_memory: batches are in page-locked memory.
    """

    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    fused: bool | None = None
    compile: bool | None = None
    sdpa: bool | None = None
    dropout: bool | None = None
    effective_batch: int | None = None
    persistent_workers: bool | None = None
    pin_memory: bool | None = None

    def with_defaults(self, other: Requested) -> Requested:
        """These, and the other's where nothing is stated here."""
        stated = {field.name: getattr(self, field.name) for field in fields(self)}
        return Requested(**{name: getattr(other, name) if value is None else value for name, value in stated.items()})


def requested_by(module: LightningModule, trainer: Trainer, seen: Observation, devices: int = 1) -> Requested:
    """What the objects of a run that has trained ask for: their flags, and the names of the module's `hparams`.

    `effective_batch` is the loader's batch size times `accumulate_grad_batches` and devices, where the hyperparameters
    name no other and the first batch had as many rows: a loader may count questions with several answers each.
    """
    named = _named(dict(module.hparams))
    loader = trainer.train_dataloader
    workers = getattr(loader, "num_workers", 0)
    size = getattr(loader, "batch_size", None)
    plain = module.automatic_optimization and seen.batches and seen.batches[0].rows == size
    accumulated = size * trainer.accumulate_grad_batches * devices if size and plain else None
    tf32 = torch.cuda.is_available() and seen.device.fp32_matmul == "tf32"
    fused = any(optimizer.defaults.get("fused") for optimizer in trainer.optimizers)
    return Requested(
        bf16="bf16" in str(trainer.precision) or named.get("bf16"),
        fp16=str(trainer.precision) == "16-mixed" or named.get("fp16"),
        tf32=tf32 or named.get("tf32"),
        fused=fused or named.get("fused"),
        compile=any(is_compiled(part) for part in module.modules()) or named.get("compile"),
        sdpa=_sdpa(module),
        dropout=any(rate > 0 for rate in dropout_rates(module)) or None,
        effective_batch=named.get("effective_batch") or accumulated,
        persistent_workers=bool(getattr(loader, "persistent_workers", False)) if workers else None,
        pin_memory=bool(getattr(loader, "pin_memory", False)) if trainer.strategy.root_device.type == "cuda" else None,
    )


def is_compiled(part: nn.Module) -> bool:
    """Whether a module was given to torch.compile, in place or as a whole."""
    return compiled_call(part) is not None or type(part).__name__ == "OptimizedModule"


def dropout_rates(module: nn.Module) -> Iterator[float]:
    """The probability of each dropout module."""
    return (float(part.p) for part in module.modules() if isinstance(part, DROPOUT))


def transformer_of(module: nn.Module) -> Any | None:
    """The first transformers model within a module; None: there is none."""
    return next((part for part in module.modules() if hasattr(part, "set_attn_implementation")), None)


def _sdpa(module: nn.Module) -> bool | None:
    model = transformer_of(module)
    implementation = None if model is None else attention_implementation(model)
    return None if implementation is None else implementation != "eager"


def _named(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The requests among (nested) hyperparameters."""
    found: dict[str, Any] = {}
    for name, value in hparams.items():
        if isinstance(value, Mapping):
            found |= _named(value)
            continue
        if NO_REQUEST.search(str(name).lower()):
            continue
        for request, pattern in PATTERNS.items():
            if not pattern.search(str(name).lower()) and not (request == "bf16" and "bf16" in str(value).lower()):
                continue
            if request == "effective_batch":
                if isinstance(value, int) and not isinstance(value, bool):
                    found[request] = value
            elif value and str(value).lower() not in ("false", "off", "never", "no", "none", "auto"):
                found[request] = True
    return found


@dataclass(frozen=True)
class ObservedRun:
    """What the rules judge a run by.

    Attributes:
        seen: what was observed.
        requested: what the configuration asks for.
        module: after the run.
        trainer: after the run.
        devices: that the run is configured for; one of them was observed.
    """

    seen: Observation
    requested: Requested
    module: LightningModule
    trainer: Trainer
    devices: int = 1

    @property
    def device(self) -> torch.device:
        """Where the training ran."""
        return self.trainer.strategy.root_device

    @property
    def sixteen_bit_row(self) -> str:
        """The name of the row on 16-bit products: of those that are requested, else of those that the hardware has."""
        asked = self.requested
        fp16 = asked.fp16 or (not asked.bf16 and choose_precision(self.device.type)[0] == "16-mixed")
        return f"{'fp16' if fp16 else 'bf16'} matrix products"


def on_off(value: bool | None) -> str:
    """A request as text."""
    return NOT_STATED if value is None else "on" if value else "off"
