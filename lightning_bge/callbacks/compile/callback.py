"""torch.compile for an encoder's layers, in place, and only where it pays."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_bge.callbacks.compile.policy import (
    MARGIN,
    MOST_TRYING,
    CompileConfig,
    Findings,
    judge,
    span,
    time_limit_s,
    too_short,
)
from lightning_bge.callbacks.compile.probe import Capture, OutOfTime, can_bound, measure, missing_tool, stop_workers
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.clock import wait_for

log = logging.getLogger(__name__)

Layers = Callable[[LightningModule], Sequence[nn.Module]]

WARM_UP_STEPS = 3  # the first steps are slower: the allocator, the optimizer's state, caches
TIMED_STEPS = 8

_clock = time.perf_counter

_findings: dict[Hashable, Findings] = {}
_said: dict[Hashable, bool] = {}


def find_layers(module: nn.Module) -> list[nn.Module]:
    """The longest `nn.ModuleList` whose modules are of one class: an encoder's layers. Empty where there is none.

    A layer with a true attribute `stays_eager` is left out.
    """
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    longest = max((part for part in lists if len({type(layer) for layer in part}) == 1), key=len, default=[])
    return [layer for layer in longest if not getattr(layer, "stays_eager", False)]


def compile_layers(layers: Sequence[nn.Module], config: CompileConfig) -> None:
    """Compile layers in place, so that no key changes; those that are compiled already are left as they are."""
    for layer in layers:
        if layer._compiled_call_impl is None:
            # CUDA graphs are recorded for one shape each
            layer.compile(dynamic=config.mode != "reduce-overhead", mode=config.mode, backend=config.backend)


def undo_compile(layers: Sequence[nn.Module]) -> None:
    """Make layers eager again."""
    for layer in layers:
        layer._compiled_call_impl = None


def signature(layer: nn.Module) -> Hashable:
    """What a graph depends on: the modules' classes and flags, the parameters' shapes and types."""
    parts = tuple(
        (
            name,
            type(part).__qualname__,
            *((key, value) for key, value in sorted(vars(part).items()) if _is_flag(key, value)),
        )
        for name, part in layer.named_modules()
    )
    return parts, tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _is_flag(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "training" and (value is None or isinstance(value, bool))


class CompileLayers(Callback):
    """Compiles the encoder's layers in place: always, never, or where a measurement says that it pays.

    No key, checkpoint or export changes, and a layer that is compiled already is not compiled again. With `auto` the
    first steps run eager and are timed. If compiling could pay, one layer's calls of one real batch are replayed,
    forward and backward, eager and compiled, within `time_limit`; results stay as they were, random numbers too. What
    was measured is remembered in the process: the next trial decides by arithmetic alone.

    Args:
        config: policy, mode, time limit, back end.
        layers: which modules of the LightningModule; None: the longest `nn.ModuleList` of modules of one class.
        steps_left: optimizer steps that this process still has to train from the start of this `fit` on, over all
            folds and trials; None: those of this `fit`.

    Attributes:
        in_effect: whether the layers are compiled now.
        reason: why, in one line.
        graphs: graphs that were compiled during this `fit`.
        recompiles: functions that were compiled anew in a loop whose graphs were there, during this `fit`.
        given_up: functions that torch.compile gave up (its limit of recompilations, or code that it can't trace) and
            that run eager.

    Raises:
        ConfigError: at the start of `fit`: policy always where there are no layers, or no compiler.
    """

    def __init__(
        self,
        config: CompileConfig = CompileConfig(),  # noqa: B008 - frozen
        layers: Layers | None = None,
        steps_left: int | None = None,
    ) -> None:
        if steps_left is not None and steps_left < 0:
            raise ConfigError(f"compile.steps_left: expected optimizer steps, 0 or more, got {steps_left}")
        self.config, self.layers, self.steps_left = config, layers, steps_left
        self._reset()

    def _reset(self) -> None:
        self.in_effect, self.reason = False, "no training step was made"
        self.graphs = self.recompiles = self.given_up = 0
        self._layers: list[nn.Module] = []
        self._key: Hashable = None
        self._found = Findings(graphs=0)
        self._phase: Literal["new", "warm-up", "timing", "capture", "done"] = "done"
        self._capture: Capture | None = None
        self._seen = dynamo_counts()
        self._first_step = self._start = self._batches = 0
        self._seconds = 0.0
        self._since: float | None = None

    def describe(self) -> dict[str, Any]:
        """Policy, what is in effect and why, and the figures, as plain data; None where nothing was measured."""
        found = _findings.get(self._key)
        measured = found.measured if found else None
        return {
            "policy": self.config.policy,
            "mode": self.config.mode,
            "backend": self.config.backend,
            "in_effect": self.in_effect,
            "reason": self.reason,
            "layers": len(self._layers),
            "step_ms": found.step_s * 1000 if found and found.step_s is not None else None,
            "compile_s": measured.compile_s if measured else None,
            "saved_ms": found.saved_s(len(self._layers)) * 1000 if found and measured else None,
            "graphs": self.graphs,
            "recompiles": self.recompiles,
            "given_up": self.given_up,
        }

    # ------------------------------------------------------------------ deciding

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; compile them where nothing has to be measured first."""
        self._reset()
        if self.config.policy == "never":
            self.reason = "compile off: the policy is never"
            return
        self._layers = list((self.layers or find_layers)(pl_module))
        kinds = tuple(dict.fromkeys(signature(layer) for layer in self._layers))
        config = self.config
        self._key = (len(self._layers), kinds, str(pl_module.device), trainer.precision, config.mode, config.backend)
        self._found = _findings.setdefault(self._key, Findings(graphs=2 * len(kinds)))
        obstacle = self._obstacle(trainer, pl_module)
        if self._layers and all(layer._compiled_call_impl is not None for layer in self._layers):
            self._decide(True, self._found.decided or "compile on: the layers are compiled already")
        elif config.policy == "always":
            if obstacle is not None:
                raise ConfigError(f"compile.policy is always, but {obstacle}; or set the policy to auto or never")
            self._decide(True, "compile on: the policy is always")
        elif obstacle is not None:
            self._decide(False, f"compile off: {obstacle}")
        else:
            self._phase, self.reason = "new", "compile off: training ended before it was decided"

    def _obstacle(self, trainer: Trainer, module: LightningModule) -> str | None:
        if not self._layers:
            return (
                f"{type(module).__name__} has no nn.ModuleList of one class of modules: give CompileLayers its layers"
            )
        if (missing := missing_tool(module.device, self.config.backend)) is not None:
            return missing
        if self.config.policy == "always":
            return None
        if trainer.world_size > 1:
            return "auto measures on one device only, and there are more: set the policy to always"
        if not can_bound():
            return "a trial compilation can be bounded in time in the main thread only: set the policy to always"
        return None

    def _steps(self, trainer: Trainer) -> float:
        """Optimizer steps left."""
        if self.steps_left is not None:
            return max(self.steps_left - (trainer.global_step - self._first_step), 0)
        return max(trainer.estimated_stepping_batches - trainer.global_step, 0)

    def _consider(self, trainer: Trainer) -> None:
        """Decide by what is known, or go on to what has to be known next."""
        found, steps = self._found, self._steps(trainer)
        if found.decided is not None:
            self._decide(True, found.decided)
        elif found.step_s is None:
            self._phase = "warm-up"
        elif found.measured is not None:
            on, reason = judge(found, len(self._layers), steps)
            found.decided = reason if on else None
            self._decide(on, reason)
        elif (text := too_short(found, steps)) is not None:
            self._decide(False, text)
        elif found.failed is not None and time_limit_s(found, steps, self.config) < MARGIN * found.tried_s:
            self._decide(False, f"compile off: {found.failed}")
        else:
            self._phase = "capture"

    def _decide(self, on: bool, reason: str) -> None:
        self._phase, self.in_effect, self.reason = "done", on, reason
        if on:
            compile_layers(self._layers, self.config)
        if _said.get(self._key) is not on:  # once a process, not once a trial
            _said[self._key] = on
            log.info(reason)

    def _probe(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure one layer and decide."""
        assert self._capture is not None
        capture, self._capture, found, steps = self._capture, None, self._found, self._steps(trainer)
        limit = time_limit_s(found, steps, self.config)
        log.info("compile: trying one of %d layers for at most %s", len(self._layers), span(limit))
        self._mark()
        try:
            found.measured = measure(capture, lambda layer: compile_layers([layer], self.config), limit, _clock)
            found.failed = None
        except OutOfTime:
            why = "" if limit == self.config.time_limit else f", {MOST_TRYING:.0%} of the time that is left"
            found.failed, found.tried_s = f"one layer was not compiled within {span(limit)}{why}", limit
        except Exception as error:
            summary = (str(error).strip().splitlines() or [""])[0]
            found.failed, found.tried_s = f"trying it failed: {type(error).__name__}: {summary}", math.inf
            log.warning("compile: trying it failed", exc_info=error)
        self._count(None)
        self._consider(trainer)
        if not self.in_effect:
            stop_workers()

    # ------------------------------------------------------------------ timing

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, or watch a layer's calls, where something has to be measured."""
        if self._phase == "new":
            self._first_step = trainer.global_step
            self._consider(trainer)
            self._restart(trainer)
        if self._phase == "timing" and self._since is None:
            wait_for(pl_module.device)
            self._since = _clock()
        elif self._phase == "capture":
            self._capture = Capture(self._layers[(len(self._layers) - 1) // 2])
        self._mark()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on to the next measurement when enough steps were made."""
        self._count("train")
        if self._capture is not None:
            self._capture.close()
            self._probe(trainer, pl_module)
        if self._phase not in ("warm-up", "timing"):
            return
        self._batches += 1
        steps = trainer.global_step - self._start
        if self._phase == "warm-up" and steps >= WARM_UP_STEPS:
            self._restart(trainer)
            self._phase = "timing"
        elif self._phase == "timing" and steps >= TIMED_STEPS:
            self._stop(pl_module)
            self._found.step_s, self._found.batches = self._seconds / steps, self._batches / steps
            self._consider(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._start, self._batches = trainer.global_step, 0
        self._seconds, self._since = 0.0, None

    def _stop(self, module: LightningModule) -> None:
        if self._phase == "timing" and self._since is not None:
            wait_for(module.device)
            self._seconds += _clock() - self._since
            self._since = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock between epochs."""
        self._stop(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        self._stop(pl_module)

    # ------------------------------------------------------------------ counting

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Count from here."""
        self._mark()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Count what was compiled."""
        self._count("validate")

    def _mark(self) -> None:
        self._seen = dynamo_counts()

    def _count(self, loop: str | None) -> None:
        """Count what was compiled since the last mark; `loop` None: by the probe."""
        functions, done, graphs = (now - seen for now, seen in zip(dynamo_counts(), self._seen, strict=True))
        self.graphs += graphs
        self.given_up += functions - done
        if loop is not None and self.in_effect:
            self.recompiles += functions if loop in self._found.warm else 0
            self._found.warm.add(loop)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was compiled after the warm-up."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._close()

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        self._phase = "done"
        if self.recompiles or self.given_up:
            log.warning(
                "compile: %d functions were compiled anew after the warm-up, %d were given up and run eager; "
                "TORCH_LOGS=recompiles says why",
                self.recompiles,
                self.given_up,
            )


def dynamo_counts() -> tuple[int, int, int]:
    """Functions that this process gave to torch.compile, those compiled, and graphs; by torch's own counters."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported for this, as that takes seconds
    if dynamo is None:
        return 0, 0, 0
    frames = dynamo.counters["frames"]
    return frames["total"], frames["ok"], dynamo.counters["stats"]["unique_graphs"]
