"""The largest micro-batch that fits into memory and pays, found by trial steps before training starts."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.micro_batch.cache import FoundSize, MicroBatchSizes, describe_step, digest, log_once
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.probe import Probe, make_meter, map_large_blocks, obstacle
from lightning_bge.callbacks.micro_batch.search import FreeMemory, Search
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.memory import Limit, cache_bytes, format_bytes, limits, release
from lightning_bge.runtime.micro_batch import SupportsMicroBatchSize, batch_source


class MicroBatchFinder(Callback):
    """Finds the largest micro-batch that fits and pays, and hands it to the batch source, when training starts.

    By then precision, attention, compiled layers, train mode, weights and optimizers are those of the run. Trial steps
    of growing size go through the module's own `training_step` (forward, backward, clipping; the optimizers' state is
    there) and `validation_step`. Sizes are doubled while that brings speed. What fits is predicted from the sizes
    tried; on a GPU it is then found by tries, on the host nothing beyond the margin is tried. Where the host's memory
    decides, large blocks are mapped one by one from then on (`map_large_blocks`), so that the answer holds. Nothing
    else of the run changes: weights, gradients, optimizers, schedules, random numbers, modes and what lists, dicts and
    tensors of the module hold are restored. Each rank searches on its own, then all take the smallest size of any: a
    module whose steps wait for other ranks has a method `trial_steps` that returns a context, in which they do not.
    What was found is cached by all that the memory of a step depends on; a second run makes no trial step.

    The batch source (see `SupportsMicroBatchSize`) is the trainer's data module, or else the LightningModule. On a CPU
    without a stated limit, and where memory can't be measured or steps can't be tried alone (as with sharded
    strategies), `default_size` is taken.

    Args:
        config: limit, margin, when to stop.
        cache_dir: folder of `micro_batch_sizes.json`. None: the environment variable LIGHTNING_BGE_CACHE, else
            ~/.cache/lightning-bge.

    Attributes:
        reason: why, in one line.

    Raises:
        RuntimeError: at the start of training: memory was not freed after a trial step ran out of it.
    """

    def __init__(
        self,
        config: MemoryConfig = MemoryConfig(),  # noqa: B008 - frozen
        cache_dir: str | Path | None = None,
    ) -> None:
        self.config = config
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._sizes = MicroBatchSizes(folder if config.cache else None)
        self._reset()

    def _reset(self, reason: str = "no training step was made") -> None:
        self.reason = reason
        self._source: SupportsMicroBatchSize | None = None
        self._key = ""
        self._found: FoundSize | None = None
        self._from_cache = False

    @property
    def micro_batch_size(self) -> int | None:
        """The size in effect; None before training, and where this callback does not set it."""
        return None if self._found is None else self._found.micro_batch_size

    def describe(self) -> dict[str, Any]:
        """Size and reason, and the figures behind them as plain data; memory in bytes, above what is held anyway.

        `tried` lists (size, peak, seconds) of each trial step, None where it failed; `peak` is the size's own.
        """
        found = self._found or FoundSize(0, self.reason)
        figures = {"safety_margin": self.config.safety_margin, "from_cache": self._from_cache}
        return {**asdict(found), "micro_batch_size": self.micro_batch_size, **figures}

    # ------------------------------------------------------------------ finding

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the size up, or search it, and hand it to the batch source."""
        source = batch_source(trainer, pl_module)
        if source is None or not hasattr(source, "worst_case_batch"):
            self._reset(
                "no micro-batch size: neither data module nor module is a batch source (see SupportsMicroBatchSize)"
            )
            log_once(self.reason, logging.WARNING)
            return
        if not getattr(source, "auto_micro_batch_size", True):
            self._reset("the micro-batch size is the user's")
            return
        self._reset()
        known = limits(pl_module.device, self.config.limit_bytes)
        self._key = self._make_key(trainer, pl_module, source, known)
        found = self._sizes.get(self._key)
        self._from_cache = found is not None
        if found is None:
            found = self._find(trainer, pl_module, source, known)
        elif found.mapped:
            map_large_blocks()
        found = replace(found, micro_batch_size=_smallest(found.micro_batch_size, pl_module.device))
        self._found, self._source, self.reason = found, source, found.reason
        source.set_micro_batch_size(found.micro_batch_size)
        if not self._from_cache and found.tried:
            self._sizes.put(self._key, found)
        level = logging.INFO if found.fits else logging.WARNING
        log_once(f"micro-batch size {found.micro_batch_size:,}: {found.reason}", level)

    def _make_key(
        self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize, known: list[Limit]
    ) -> str:
        """A key for all that the answer depends on."""
        # not the memory of the machine: it was not set for this process, and others use it too
        totals = sorted((limit.name, limit.total) for limit in known if limit.stated or limit.raises)
        data = {name: getattr(source, f"micro_batch_size_{name}", None) for name in ("key", "step")}
        config = {name: value for name, value in asdict(self.config).items() if name != "cache"}
        content = {**describe_step(trainer, module), "data": data, "limits": totals, "config": config}
        if module.device.type == "cpu" and (most := cache_bytes()[1]):
            content["caches"] = most
        return digest(content)

    def _find(
        self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize, known: list[Limit]
    ) -> FoundSize:
        meter = make_meter(module.device, address_space=any(limit.raises for limit in known))
        hindrance = obstacle(trainer)
        if module.device.type == "cpu" and not any(limit.stated for limit in known):
            hindrance = "no limit on memory is stated (memory.limit_gb, control group, RLIMIT)"
        elif hindrance is None and isinstance(meter, str):
            hindrance = meter
        if hindrance is not None or isinstance(meter, str):
            return FoundSize(self.config.default_size, str(hindrance))
        step = getattr(source, "micro_batch_size_step", 1)
        with Probe(trainer, module, lambda units, train: source.worst_case_batch(units * step, train), meter) as probe:
            if probe.prepare():
                return self._search(probe, module.device, step)
        reason = (
            f"not even this fits ({probe.failure}); gradient checkpointing, a shorter maximum length or a smaller "
            "model save memory"
        )
        return FoundSize(step, reason, [(step, None, None)], fits=False)

    def _search(self, probe: Probe, device: torch.device, step: int) -> FoundSize:
        """Where there is plenty of memory speed decides; else the host's blocks are mapped, so that answers hold."""
        config, tried, on_host = self.config, [], device.type == "cpu"

        def free_memory() -> FreeMemory:
            return _free_memory(limits(device, config.limit_bytes), on_host)

        for plenty in (True, False) if on_host else (False,):
            if not plenty and on_host:
                map_large_blocks()
                release()
            search = Search(
                probe.attempt,
                free_memory,
                config.safety_margin,
                config.min_speedup,
                config.default_size // step,
                step=step,
                noise=probe.meter.noise,
            )
            answer = search.run_if_plenty() if plenty else search.run()
            tried += [(units * step, peak, seconds) for units, peak, seconds in search.tried]
            if answer is not None:
                break
        assert answer is not None
        units, limit = max(answer.units, 1), limits(device, config.limit_bytes)[0]
        peak = search.peak(units)
        return FoundSize(
            units * step,
            f"{answer.reason}; {_describe_peak(peak, limit)}",
            tried,
            fits=answer.units > 0,
            mapped=on_host and not plenty,
            peak=peak,
            limit=limit.name,
            limit_bytes=limit.total,
        )

    # ------------------------------------------------------------------ after an out-of-memory error

    def lower(self, size: int) -> None:
        """Keep a smaller size than was found, for this run and later ones; a larger one is ignored.

        Args:
            size: one that is expected to fit.
        """
        if self._found is None or size >= self._found.micro_batch_size:
            return
        self.reason = f"lowered from {self._found.micro_batch_size:,} after an OOM"
        self._found = replace(self._found, micro_batch_size=size, reason=self.reason)
        self._sizes.put(self._key, self._found)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Keep the size in effect where it was lowered."""
        if self._source is not None:
            self.lower(self._source.micro_batch_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the size in effect where it was lowered; an `OOMHandler` that comes later calls `lower`."""
        self.on_train_batch_end()


def _describe_peak(peak: int, limit: Limit) -> str:
    used = format_bytes(min(limit.used + peak, limit.total))
    return f"peak about {used} of {format_bytes(limit.total)} ({limit.name})"


def _free_memory(known: list[Limit], on_host: bool) -> FreeMemory:
    """On the host nothing is tried beyond a limit, even where that raises an error.

    Where an allocation of oneDNN fails, it can make no new kernel in that thread for the rest of the process. What
    caches may yet fill of the host's memory is left to them, so that answers hold when they do.
    """
    promised = cache_bytes()[0] if on_host else 0
    raising = [limit.free for limit in known if limit.raises and not on_host]
    killing = [max(limit.free - promised, 0) for limit in known if not limit.raises or on_host]
    return FreeMemory(min(raising, default=None), min(killing, default=None))


def _smallest(size: int, device: torch.device) -> int:
    """The smallest size of all ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return size
    found = torch.tensor([size], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found.item())
