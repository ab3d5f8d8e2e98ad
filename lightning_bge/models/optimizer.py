"""AdamW and its schedules, counted in optimizer steps."""

import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.torch import with_found_inf
from lightning_bge.runtime.log_once import log_once

log = logging.getLogger(__name__)

OptimizerName = Literal["adamw", "adamw_8bit"]
ScheduleName = Literal["linear", "cosine", "cosine_with_restarts", "constant"]

LAYER = re.compile(r"\.(?:layer|layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), by the fused kernel where it is torch's.

    Attributes:
        name: adamw, or adamw_8bit (Dettmers et al., arXiv:2110.02861), which stores both moments in 8 bits for every
            parameter of at least 4096 elements: 2 bytes an element instead of 8. It needs bitsandbytes (torchao's
            state can't be loaded from a checkpoint by Lightning 2.6.6).
        lr: peak learning rate.
        weight_decay: applies to weight matrices only, not to norms and biases.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the denominator for numerical stability.
        layer_decay: factor between the learning rates of a layer and of the layer above; 1: the same for all layers.
        max_grad_norm: gradients are clipped to this norm; null switches clipping off.
    """

    name: OptimizerName = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    layer_decay: float = 1.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            expected = ", ".join(get_args(OptimizerName))
            raise ConfigError(f"model.optimizer.name: expected one of {expected}, got {self.name}")
        if self.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ConfigError(
                "model.optimizer.name is adamw_8bit, but bitsandbytes is not installed: "
                "pip install 'lightning-bge[lowbit]'"
            )
        if self.lr <= 0:
            raise ConfigError(f"model.optimizer.lr: expected more than 0, got {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.optimizer.{name}: expected 0 to below 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ConfigError(f"model.optimizer.weight_decay: expected 0 or more, got {self.weight_decay}")
        if self.eps <= 0:
            raise ConfigError(f"model.optimizer.eps: expected more than 0, got {self.eps}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"model.optimizer.layer_decay: expected above 0 and at most 1, got {self.layer_decay}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ConfigError(f"model.optimizer.max_grad_norm: expected more than 0 or null, got {self.max_grad_norm}")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the optimizer steps of a run.

    Attributes:
        name: linear (to 0), cosine (to 0), cosine_with_restarts, or constant; each after the warm-up.
        warmup: warm-up steps; below 1: a fraction of all steps.
        cycles: number of cosine cycles of `cosine_with_restarts`.
        epochs: number of epochs that the schedule covers; null: trainer.max_epochs. A refit that stops at an earlier
            epoch sets it, so that its learning rates equal those of the folds.
    """

    name: ScheduleName = "linear"
    warmup: float = 0.1
    cycles: int = 1
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            expected = ", ".join(get_args(ScheduleName))
            raise ConfigError(f"model.schedule.name: expected one of {expected}, got {self.name}")
        if self.warmup < 0:
            raise ConfigError(f"model.schedule.warmup: expected 0 or more, got {self.warmup}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"model.schedule.epochs: expected 1 or more, or null, got {self.epochs}")
        if self.cycles < 1:
            raise ConfigError(f"model.schedule.cycles: expected 1 or more, got {self.cycles}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the parameters that need a gradient, grouped by decay and by layer."""
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # takes seconds

        return with_found_inf(AdamW8bit)(groups, lr=config.lr, betas=betas, eps=config.eps)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Make the state that the first step would make, so that a step has nothing left to allocate for it.

    For optimizers of `build_optimizer`, once the parameters are on their device; others are left alone. State that is
    already there, for example from a checkpoint, is kept; a first step afterwards is the same, bit for bit.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if state:
                continue
            if isinstance(optimizer, AdamW) and group["fused"]:
                # as torch makes them for the fused kernel
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            elif hasattr(optimizer, "init_state"):  # bitsandbytes'
                optimizer.init_state(group, parameter, number, index)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: vectors (norms, biases) without decay; lr = `lr * layer_decay ** (layers above)`.

    The head has the full rate, the top layer one factor of `layer_decay`, the embeddings one for every layer and one.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = 1 + max((int(found.group(1)) for name, _ in named if (found := LAYER.search(name))), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        lr = config.lr * config.layer_decay ** _layers_above(name, layers)
        groups[lr, decay].append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def _layers_above(name: str, layers: int) -> int:
    found = LAYER.search(name)
    if found:
        return layers - int(found.group(1))
    return layers + 1 if "embeddings" in name else 0


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> LambdaLR:
    """The schedule over `total_steps` optimizer steps, from transformers."""
    warmup = round(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)
    if warmup >= total_steps:
        text = f"model.schedule.warmup: {warmup} steps of warm-up, and {total_steps} in all: the learning rate is never"
        log_once(log, logging.WARNING, f"{text} reached. Lower it; below 1 it is a fraction of all steps")
    if config.name == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    if config.name == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, total_steps)
    if config.name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup, total_steps)
    return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, total_steps, config.cycles)
