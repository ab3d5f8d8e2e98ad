"""Optimizer and schedule by the path of their class, tried before the first step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig, build_schedule, parameter_groups
from lightning_bge.models.optimizer_class import make_optimizer, try_optimizer, try_schedule


class ThreeLayers(nn.Module):
    """Names of parameters as an encoder has them, for a check before one is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(2, 2)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])})
        self.classifier = nn.Linear(2, 1)


def try_classes(
    model: nn.Module,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    *,
    total_steps: int,
    steps: int,
    imports: bool = True,
) -> None:
    """Step an optimizer by its class, and a schedule by its class through a whole run, with tiny parameters.

    Args:
        model: whose parameter groups, by names, the schedule is tried with.
        optimizer: options of the optimizer.
        schedule: options of the schedule.
        total_steps: optimizer steps that the schedule covers.
        steps: those of the run.
        imports: whether the modules of class paths may be imported; see `find_class`.

    Raises:
        ConfigError: see `try_optimizer` and `try_schedule`.
    """
    if optimizer.class_path is not None:
        try_optimizer(optimizer.class_path, optimizer.init_args, imports=imports)
    if schedule.class_path is None:
        return
    groups = parameter_groups(model, optimizer, imports)
    tiny = [{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in groups]
    wanted = [group.get("lr", 0.0) for group in groups]
    stepped: Optimizer = AdamW(tiny, lr=optimizer.lr)
    if optimizer.class_path is not None:
        stepped = make_optimizer(optimizer.class_path, optimizer.init_args, tiny, imports=imports)
    made = build_schedule(stepped, schedule, total_steps, imports)
    try_schedule(schedule.class_path, made, stepped, wanted, steps)
