"""torch.compile for an encoder's layers, in place, and only where it pays."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_bge.callbacks.compile.layers import compile_layers, find_layers, signature
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
    Findings,
    decide,
    format_seconds,
    probe_time_limit,
    too_short,
)
from lightning_bge.callbacks.compile.probe import Capture, TimeLimitExceeded, can_limit_time, measure, missing_tool
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.clock import wait_for
from lightning_bge.runtime.compat.torch import compiled_call, dynamo_counts, stop_compile_workers

log = logging.getLogger(__name__)

Layers = Callable[[LightningModule], Sequence[nn.Module]]

# With reduce-overhead token totals are rounded up to multiples of this: a CUDA graph is recorded for each total. Micro-
# batches of up to 16,384 tokens then have 16 totals at most, and half of this is added to each on average.
TOKENS_PER_GRAPH = 1024
WARM_UP_STEPS = 3  # the first steps are slower: the allocator, the optimizer's state, caches
TIMED_STEPS = 8

_clock = time.perf_counter

_findings: dict[Hashable, Findings] = {}
_logged: dict[Hashable, bool] = {}


class CompileLayers(Callback):
    """Compiles the encoder's layers in place: always, never, or where a measurement shows that it pays.

    No key, checkpoint or export changes, and a compiled layer is not compiled twice. With `auto` the first steps run
    eager and are timed. If compiling could pay, one layer's calls of one real batch are replayed, forward and backward,
    eager and compiled, within `time_limit`; results and random numbers do not change. What was measured is remembered
    in the process: the next trial decides by arithmetic alone.

    Args:
        config: policy, mode, time limit, back end.
        layers: which modules of the LightningModule; None: the longest `nn.ModuleList` of modules of one class.
        steps_left: optimizer steps that this process still has to train from the start of this `fit` on, over all
            folds and trials; None: those of this `fit`.

    Attributes:
        in_effect: whether the layers are compiled now.
        reason: why, in one line.
        found: what this process knows of such layers; with the policy auto it is filled as it is measured.
        graphs: graphs that torch compiled in this process during this `fit`, at its end.

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
            raise ConfigError(f"CompileLayers: steps_left: expected optimizer steps, 0 or more, got {steps_left}")
        self.config, self.layers, self.steps_left = config, layers, steps_left
        self._reset()

    def _reset(self) -> None:
        self.in_effect, self.reason = False, "no training step was made"
        self.graphs, self._graphs_before = 0, dynamo_counts()[-1]
        self._layers: list[nn.Module] = []
        self._rounding: list[Any] = []  # parts of the module that can round their token totals, and do not
        self._key: Hashable = None
        self.found = Findings(layers=0, graphs=0)
        self._phase: Literal["new", "timing", "capture", "done"] = "done"
        self._capture: Capture | None = None
        self._first_step = self._batches = 0
        self._seconds = 0.0
        self._since: float | None = None

    # ------------------------------------------------------------------ deciding

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; compile them where nothing has to be measured first."""
        self._reset()
        if self.config.policy == "never":
            self.reason = "compile off: the policy is never"
            return
        self._layers = list((self.layers or find_layers)(pl_module))
        self._rounding = [part for part in pl_module.modules() if getattr(part, "token_bucket", 0) is None]
        kinds = tuple(dict.fromkeys(signature(layer) for layer in self._layers))
        config = self.config
        self._key = (len(self._layers), kinds, str(pl_module.device), trainer.precision, config.mode, config.backend)
        self.found = _findings.setdefault(self._key, Findings(len(self._layers), 2 * len(kinds)))
        obstacle = self._obstacle(trainer, pl_module)
        if self._layers and all(compiled_call(layer) is not None for layer in self._layers):
            self._decide(True, self.found.decided or "compile on: the layers are compiled already")
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
        if not can_limit_time():
            return "the time of a trial compilation can be limited in the main thread only: set the policy to always"
        return None

    def _steps(self, trainer: Trainer) -> float:
        """Optimizer steps left."""
        if self.steps_left is not None:
            return max(self.steps_left - (trainer.global_step - self._first_step), 0)
        return max(trainer.estimated_stepping_batches - trainer.global_step, 0)

    def _consider(self, trainer: Trainer) -> None:
        """Decide by what is known, or start the next measurement."""
        found, steps = self.found, self._steps(trainer)
        if found.decided is not None:
            self._decide(True, found.decided)
        elif found.step_s is None:
            self._phase = "timing"
        elif found.measured is not None:
            on, reason = decide(found, steps)
            found.decided = reason if on else None
            self._decide(on, reason)
        elif (text := too_short(found, steps)) is not None:
            self._decide(False, text)
        elif found.failed is not None:
            self._decide(False, f"compile off: {found.failed}")
        else:
            self._phase = "capture"

    def _decide(self, on: bool, reason: str) -> None:
        self._phase, self.in_effect, self.reason = "done", on, reason
        if on:
            compile_layers(self._layers, self.config)
            if self.config.mode == "reduce-overhead":
                self._round_to(TOKENS_PER_GRAPH)
        if _logged.get(self._key) is not on:  # once a process, not once a trial
            _logged[self._key] = on
            log.info(reason)

    def _round_to(self, tokens: int | None) -> None:
        for part in self._rounding:
            part.token_bucket = tokens

    def _probe(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure one layer and decide."""
        assert self._capture is not None
        capture, self._capture, found, steps = self._capture, None, self.found, self._steps(trainer)
        limit = probe_time_limit(found, steps, self.config)
        log.info("compile: measuring one of %d layers for at most %s", len(self._layers), format_seconds(limit))
        try:
            found.measured = measure(capture, lambda layer: compile_layers([layer], self.config), limit, _clock)
        except TimeLimitExceeded:
            found.failed = f"one layer was not compiled within {format_seconds(limit)}"
        except Exception as error:
            summary = (str(error).strip().splitlines() or [""])[0]
            found.failed = f"measuring it failed: {type(error).__name__}: {summary}"
            log.warning("compile: measuring it failed", exc_info=error)
        self._consider(trainer)
        if not self.in_effect:
            stop_compile_workers()

    # ------------------------------------------------------------------ measuring

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, or record a layer's calls, where something has to be measured."""
        if self._phase == "new":
            self._first_step = trainer.global_step
            self._consider(trainer)
        if self._phase == "timing" and trainer.global_step - self._first_step >= WARM_UP_STEPS:
            wait_for(pl_module.device)
            self._since = _clock()
        elif self._phase == "capture":
            self._capture = Capture(self._layers[(len(self._layers) - 1) // 2])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the next measurement when enough steps were made."""
        if self._capture is not None:
            self._capture.close()
            self._probe(trainer, pl_module)
        elif self._since is not None:
            wait_for(pl_module.device)
            self._seconds, self._since, self._batches = self._seconds + _clock() - self._since, None, self._batches + 1
            steps = trainer.global_step - self._first_step - WARM_UP_STEPS
            if steps >= TIMED_STEPS:
                self.found.step_s, self.found.batches = self._seconds / steps, self._batches / steps
                self._consider(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the graphs."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._close()

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        self._round_to(None)
        self._phase, self.graphs = "done", dynamo_counts()[-1] - self._graphs_before
