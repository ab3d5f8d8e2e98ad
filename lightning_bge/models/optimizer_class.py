"""Optimizers and learning-rate schedules that YAML names by the path of their class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_bge.errors import ConfigError, first_line
from lightning_bge.runtime.class_path import find_class, parameters_of

OPTIMIZER, SCHEDULE = "model.optimizer", "model.schedule"
LENGTHS = ("total_steps", "T_max", "num_training_steps")
"""Arguments of schedules that are the number of optimizer steps, which the run alone knows."""
# torch's OneCycleLR takes these together in place of `total_steps`
OTHER_LENGTHS = ("epochs", "steps_per_epoch")
TRIED_STEPS = 3  # of an optimizer
ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    ArithmeticError,
)


def group_defaults(path: str, init_args: Mapping[str, Any], *, imports: bool = True) -> dict[str, float]:
    """The learning rate and the weight decay of a class, where it has them: what its parameter groups may vary.

    Args:
        path: of the class.
        init_args: its arguments.
        imports: see `find_class`.

    Raises:
        ConfigError: there is no such class, or `init_args` lack the learning rate, which has no good default.
    """
    known = parameters_of(_optimizer_class(path, imports))
    if "lr" in known and "lr" not in init_args:
        raise ConfigError(f"{OPTIMIZER}.init_args.lr: expected the learning rate of {path}, got nothing. Set it")
    found = {}
    for name in ("lr", "weight_decay"):
        value = init_args.get(name, known[name].default if name in known else None)
        if isinstance(value, int | float):
            found[name] = float(value)
    return found


def make_optimizer(
    path: str, init_args: Mapping[str, Any], groups: Sequence[dict[str, Any]], *, imports: bool = True
) -> Optimizer:
    """A new optimizer of the class.

    Args:
        path: of the class.
        init_args: its arguments.
        groups: of parameters, with `lr` and `weight_decay` where the class has them.
        imports: see `find_class`.

    Raises:
        ConfigError: there is no such class, or it does not accept the arguments.
    """
    kind = _optimizer_class(path, imports)
    try:
        return kind([dict(group) for group in groups], **init_args)
    except ERRORS as error:
        raise ConfigError(
            f"{OPTIMIZER}.init_args: {path} does not accept {dict(init_args)}: {first_line(error)}"
        ) from error


def try_optimizer(path: str, init_args: Mapping[str, Any], *, imports: bool = True) -> None:
    """Make an optimizer of a matrix and a vector, and step.

    Raises:
        ConfigError: as `make_optimizer`; or it can't step without a closure, of such parameters, or at all.
    """
    defaults = group_defaults(path, init_args, imports=imports)
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    optimizer = make_optimizer(path, init_args, [{"params": [one], **defaults} for one in parameters], imports=imports)
    try:
        for _ in range(TRIED_STEPS):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
    except ERRORS as error:
        raise ConfigError(
            f"{OPTIMIZER}.class_path: {path} can't step over a matrix and a vector with gradients, without a closure: "
            f"{first_line(error)}"
        ) from error
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise ConfigError(f"{OPTIMIZER}.init_args: {path} diverges with {dict(init_args)} at gradients of 0.5")


def make_schedule(
    path: str, init_args: Mapping[str, Any], optimizer: Optimizer, total_steps: int, *, imports: bool = True
) -> LRScheduler:
    """A new schedule of the class.

    Args:
        path: of the class.
        init_args: its arguments. Those of `LENGTHS` that it has get `total_steps` where they are not given; `max_lr`
            gets the learning rate of each parameter group.
        optimizer: whose learning rates it sets.
        total_steps: optimizer steps that it covers.
        imports: see `find_class`.

    Raises:
        ConfigError: there is no such class, it needs a metric, or it does not accept the arguments.
    """
    kind = _schedule_class(path, imports)
    if issubclass(kind, ReduceLROnPlateau):
        raise ConfigError(
            f"{SCHEDULE}.class_path: {path} needs the value of a metric, and schedules step after each optimizer step, "
            "where there is none. Use one that depends on the step alone, such as "
            "torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    known = parameters_of(kind)
    filled: dict[str, Any] = {name: total_steps for name in LENGTHS if name in known}
    if not set(OTHER_LENGTHS).isdisjoint(init_args):
        filled.pop("total_steps", None)
    if "max_lr" in known:
        filled["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    try:
        return kind(optimizer, **{**filled, **init_args})
    except ERRORS as error:
        raise ConfigError(
            f"{SCHEDULE}.init_args: {path} does not accept {dict(init_args)}: {first_line(error)}"
        ) from error


def try_schedule(path: str, schedule: LRScheduler, optimizer: Optimizer, wanted: Sequence[float], steps: int) -> None:
    """Step a schedule over a whole run.

    Args:
        path: of its class, for error messages.
        schedule: of `make_schedule`, for an optimizer that trains nothing.
        optimizer: this one.
        wanted: learning rates of its parameter groups, before there was a schedule.
        steps: of the run.

    Raises:
        ConfigError: it can't be stepped so often, a learning rate is negative or not finite, or the highest learning
            rates of the groups have other ratios, which are `layer_decay`.
    """
    highest = [0.0] * len(wanted)
    for step in range(steps):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ConfigError(f"{SCHEDULE}: {path} sets a learning rate of {min(rates)} at step {step} of {steps}")
        highest = [max(pair) for pair in zip(highest, rates, strict=True)]
        try:
            optimizer.step()
            schedule.step()
        except ERRORS as error:
            raise ConfigError(
                f"{SCHEDULE}: {path} can't be stepped {steps} times, as this run does (step {step + 1}): "
                f"{first_line(error)}"
            ) from error
    pairs = zip(highest, wanted, strict=True)
    if any(abs(high * wanted[0] - highest[0] * want) > 1e-3 * highest[0] * want for high, want in pairs):
        raise ConfigError(
            f"{SCHEDULE}: {path} does not keep the ratios of the layers' learning rates, which {OPTIMIZER}.layer_decay "
            f"sets. Set {OPTIMIZER}.layer_decay to 1, or leave out the learning rates in {SCHEDULE}.init_args"
        )


def _optimizer_class(path: str, imports: bool) -> Any:
    expected = f"{OPTIMIZER}.class_path: expected the path of a class that inherits from torch.optim.Optimizer"
    return find_class(path, Optimizer, expected, imports=imports)


def _schedule_class(path: str, imports: bool) -> Any:
    base = "torch.optim.lr_scheduler.LRScheduler"
    expected = f"{SCHEDULE}.class_path: expected the path of a class that inherits from {base}"
    return find_class(path, LRScheduler, expected, imports=imports)
