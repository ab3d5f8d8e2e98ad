"""The optimizer, AdamW or one by its class, and its schedule, counted in optimizer steps."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lightning_bge.errors import ConfigError
from lightning_bge.models.optimizer_class import group_defaults, make_optimizer, make_schedule
from lightning_bge.runtime.class_path import check_class_option
from lightning_bge.runtime.compat.torch import versions, with_found_inf
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.model_config import is_head

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
        class_path: an optimizer by its class in place of AdamW, such as torch.optim.SGD. `layer_decay` and
            `max_grad_norm` stay in effect, and norms and biases have no weight decay.
        init_args: arguments of the class, the learning rate `lr` among them.
    """

    name: OptimizerName = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    layer_decay: float = 1.0
    max_grad_norm: float | None = 1.0
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_class_option(self, "model.optimizer", kept=("layer_decay", "max_grad_norm"))
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
        class_path: a schedule by its class in place of `name`, such as torch.optim.lr_scheduler.OneCycleLR; it steps
            after each optimizer step.
        init_args: arguments of the class besides the optimizer. `total_steps`, `T_max` and `num_training_steps` are the
            steps of the run, and `max_lr` the learning rates of the optimizer, where the class has them and they are
            not given.
    """

    name: ScheduleName = "linear"
    warmup: float = 0.1
    cycles: int = 1
    epochs: int | None = None
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_class_option(self, "model.schedule", kept=("epochs",))
        if self.name not in get_args(ScheduleName):
            expected = ", ".join(get_args(ScheduleName))
            raise ConfigError(f"model.schedule.name: expected one of {expected}, got {self.name}")
        if self.warmup < 0:
            raise ConfigError(f"model.schedule.warmup: expected 0 or more, got {self.warmup}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"model.schedule.epochs: expected 1 or more, or null, got {self.epochs}")
        if self.cycles < 1:
            raise ConfigError(f"model.schedule.cycles: expected 1 or more, got {self.cycles}")


def build_optimizer(model: nn.Module, config: OptimizerConfig, imports: bool = True) -> Optimizer:
    """The optimizer over the parameters that need a gradient, grouped by decay and by layer.

    Args:
        model: whose parameters they are.
        config: see `OptimizerConfig`.
        imports: whether the module of `class_path` may be imported; see `find_class`.

    Raises:
        ConfigError: there is no such class, or it does not accept the arguments.
    """
    groups = parameter_groups(model, config, imports)
    if config.class_path is not None:
        return make_optimizer(config.class_path, config.init_args, groups, imports=imports)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # takes seconds

        return with_found_inf(AdamW8bit)(groups, lr=config.lr, betas=betas, eps=config.eps)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Make the state that the first step would make, so that a step has nothing left to allocate for it.

    For fused AdamW and for optimizers of bitsandbytes, once the parameters are on their device; others are left alone.
    State that is already there, for example from a checkpoint, is kept; a first step afterwards is the same, bit for
    bit.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if state:
                continue
            if type(optimizer) is AdamW and group["fused"] and not group["amsgrad"]:
                # as torch makes them for the fused kernel
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            elif _is_of(optimizer, "bitsandbytes") and hasattr(optimizer, "init_state"):
                optimizer.init_state(group, parameter, number, index)


def change_detector(optimizer: Optimizer, steps: float | torch.Tensor) -> Callable[[], bool]:
    """A function that says whether a step, which failed, may have changed weights or state since this call.

    Where that is not known, it says yes: a step that is repeated over half of its changes trains wrongly in silence.

    Args:
        optimizer: one that is about to step.
        steps: that it has made; a 0-d tensor, which may be on a device, is read where a step has failed.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # within Lightning's
    fused = any(group.get("fused") for group in optimizer.param_groups)
    # fused kernels and bitsandbytes' change no version counter; torch's fused ones count their steps first
    counts = _is_of(optimizer, "bitsandbytes") or fused
    if not counts and not _is_of(optimizer, "torch"):
        return lambda: True
    held = [] if counts else _tensors(optimizer)
    before = versions(held)

    def has_changed() -> bool:
        states = list(optimizer.state.values())
        if any(float(state.get("step", 0)) > steps for state in states):
            return True
        if counts:
            return not any("step" in state for state in states)  # SGD's fused kernel counts nothing
        known = set(map(id, held))
        made = [tensor for tensor in _tensors(optimizer) if id(tensor) not in known]
        return versions(held) != before or any(bool(tensor.any()) for tensor in made)

    return has_changed


def _tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters and the tensors of their state."""
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = [part for state in optimizer.state.values() for part in state.values()]
    return found + [part for part in parts if isinstance(part, torch.Tensor)]


def _is_of(optimizer: Optimizer, package: str) -> bool:
    return type(optimizer).__module__.split(".")[0] == package


def parameter_groups(model: nn.Module, config: OptimizerConfig, imports: bool = True) -> list[dict[str, Any]]:
    """Parameter groups: vectors (norms, biases) without decay; lr = `lr * layer_decay ** (layers above)`.

    The head has the full rate, the top layer one factor of `layer_decay`, the embeddings one for every layer and one.
    Learning rate and decay of a class are those of `init_args`, where it has them.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = 1 + max((int(found.group(1)) for name, _ in named if (found := _layer(name))), default=-1)
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.class_path is not None:
        common = group_defaults(config.class_path, config.init_args, imports=imports)
        if "lr" not in common and config.layer_decay != 1:
            raise ConfigError(
                f"model.optimizer.layer_decay: expected 1 with {config.class_path}, whose learning rate is no number, "
                f"got {config.layer_decay}"
            )
    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        own = {"lr": config.layer_decay ** _layers_above(name, layers), "weight_decay": float(parameter.ndim > 1)}
        groups[tuple((key, value * own[key]) for key, value in common.items())].append(parameter)
    return [{"params": params, **dict(options)} for options, params in groups.items()]


def _layers_above(name: str, layers: int) -> int:
    found = _layer(name)
    if found:
        return layers - int(found.group(1))
    return layers + 1 if "embeddings" in name and not is_head(name) else 0


def _layer(name: str) -> re.Match[str] | None:
    """The number of a parameter's layer in the encoder."""
    return None if is_head(name) else LAYER.search(name)


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, total_steps: int, imports: bool = True) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps, from transformers, or of the class; see `make_schedule`."""
    if config.class_path is not None:
        return make_schedule(config.class_path, config.init_args, optimizer, total_steps, imports=imports)
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
