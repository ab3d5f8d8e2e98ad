"""Everything that a trial step changes, kept so that it can be restored."""

import copy
import random
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_bge.runtime.compat.lightning import silenced
from lightning_bge.runtime.compat.torch import forget_interrupted_step, stop_stepping


class _Attributes:
    """The instance attributes of objects: bindings, and what lists, dicts and tensors hold."""

    def __init__(self, objects: list[Any]) -> None:
        self.parts = [(vars(part), {name: (v, _copy(v)) for name, v in vars(part).items()}) for part in objects]

    def restore(self) -> None:
        for now, before in self.parts:
            for name in now.keys() - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                if now.get(name, self) is not value:
                    now[name] = value
                _refill(value, content)


def _copy(value: Any) -> Any:
    if type(value) is Tensor:
        return None if value.is_inference() else value.detach().to("cpu", copy=True)
    return copy.copy(value) if isinstance(value, list | dict) else None


def _refill(value: Any, content: Any) -> None:
    """Give back a container's content, untouched where it is the same: compiled code watches some of them."""
    if isinstance(content, Tensor):
        with torch.no_grad():
            value.copy_(content)
    elif isinstance(value, list) and not _same(value, content):
        value[:] = content
    elif isinstance(value, dict) and not (_same(value, content) and _same(value.values(), content.values())):
        value.clear()
        value.update(content)


def _same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


class Kept:
    """What a module, its optimizers and its trainer were, in host memory, while trial steps run.

    Until `restore` the trainer has no callbacks, and `log` and the loggers do nothing. The weights need no copy after
    the first steps: an optimizer without state steps once, so that its state exists, and from then on `stop_optimizers`
    keeps all of them from stepping. So no limit is reached by a copy that training would not make.

    Args:
        trainer: in `fit`, with optimizers.
        module: its module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self._random = _random_state()
        self._precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._schedulers = [(scheduler, copy.deepcopy(scheduler.state_dict())) for scheduler in schedulers]
        self._optimizers = [(o, dict(vars(o)), bool(o.state), _groups(o)) for o in trainer.optimizers]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._buffers = _host_copies(module.buffers())
        self.weights: list[tuple[Tensor, Tensor]] | None = _host_copies(module.parameters())
        self._before = _Attributes(list(module.modules()))
        self._contexts = ExitStack()
        self._contexts.enter_context(silenced(trainer, module))
        if (trial_steps := getattr(module, "trial_steps", None)) is not None:
            self._contexts.enter_context(trial_steps())
        self._meanwhile = _Attributes(list(module.modules()))

    def stop_optimizers(self, every: bool = True) -> None:
        """Keep optimizers from stepping: all, or only those that have a state, of which there is no copy."""
        for optimizer, _, had_state, _ in self._optimizers:
            if every or had_state:
                stop_stepping(optimizer)

    def trainable(self) -> list[Tensor]:
        """The weights that optimizers step."""
        groups = [group for optimizer, *_ in self._optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def reset(self) -> None:
        """After each step: attributes, gradients, learning rates, schedulers."""
        self._meanwhile.restore()
        for parameter, requires_grad in self._requires_grad:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for optimizer, _, _, groups in self._optimizers:
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update({name: _clone(value) for name, value in before.items()})
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))
        if (scaler := getattr(self.trainer.precision_plugin, "scaler", None)) is not None:
            forget_interrupted_step(scaler)
            self.trainer.precision_plugin.load_state_dict(self._precision)

    def weights_changed(self) -> bool:
        """Whether a weight differs from its copy."""
        return any(not torch.equal(weight.detach().cpu(), kept) for weight, kept in self.weights or ())

    def restore_weights(self) -> None:
        """Restore the weights, where there are copies."""
        _write(self.weights or [])

    def drop_state(self) -> None:
        """Empty the state of optimizers that had none."""
        for optimizer, _, had_state, _ in self._optimizers:
            if not had_state:
                optimizer.state.clear()

    def restore(self) -> None:
        """Restore everything."""
        self.reset()
        self.restore_weights()
        self._contexts.close()
        self._before.restore()
        _write(self._buffers)
        for optimizer, attributes, *_ in self._optimizers:
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
        self.drop_state()
        _set_random_state(self._random)


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: _clone(value) for name, value in group.items()} for group in optimizer.param_groups]


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _host_copies(tensors: Any) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]


@torch.no_grad()
def _write(copies: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, kept in copies:
        tensor.copy_(kept)


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])
