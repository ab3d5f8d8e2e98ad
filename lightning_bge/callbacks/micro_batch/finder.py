"""The largest micro-batch that fits into memory and pays, found by trial steps before training starts."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.micro_batch.cache import MicroBatchSizes, describe_step, digest, log_once
from lightning_bge.callbacks.micro_batch.probe import Probe, make_meter, map_large_blocks, obstacle
from lightning_bge.callbacks.micro_batch.search import Answer, Room, Search
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.memory import Limit, cache_bytes, format_bytes, limits, release
from lightning_bge.runtime.micro_batch import SupportsMicroBatchSize, batch_source

GIB = 2**30
_NOTHING: dict[str, Any] = {
    "tried": [],
    "fits": True,
    "mapped": False,
    "peak": None,
    "limit": None,
    "limit_bytes": None,
}


@dataclass(frozen=True)
class MemoryConfig:
    """How the size of a micro-batch is found.

    Attributes:
        limit_gb: memory that this process may use on the training device, in units of 2**30 bytes. Unset: what the
            control group, RLIMIT_AS, RLIMIT_DATA or the GPU allow; on a CPU without such a limit nothing is searched.
        safety_margin: share of the activations' memory that is left free. 0.1, as allocators fragment between steps.
        min_speedup: stop where twice the size brings less than this share more tokens a second. null: take as much as
            memory allows.
        default_size: tokens. Speed is not measured below this size, which is also taken where nothing can be searched.
        cache: keep what was found in a file, for other processes and later runs.
    """

    limit_gb: float | None = None
    safety_margin: float = 0.1
    min_speedup: float | None = 0.05
    default_size: int = 8192
    cache: bool = True

    def __post_init__(self) -> None:
        checks = {
            "limit_gb": ("a number above 0, or null", self.limit_gb is None or 0 < self.limit_gb < math.inf),
            "safety_margin": ("0 to below 1", 0 <= self.safety_margin < 1),
            "min_speedup": ("0 or more, or null", self.min_speedup is None or 0 <= self.min_speedup < math.inf),
            "default_size": ("1 token or more", self.default_size >= 1),
        }
        for name, (expected, good) in checks.items():
            if not good:
                raise ConfigError(f"memory.{name}: expected {expected}, got {getattr(self, name)}")


class MicroBatchFinder(Callback):
    """Finds the largest micro-batch that fits and pays, and hands it to the batch source, when training starts.

    By then precision, attention, compiled layers, train mode, weights and optimizers are those of the run. Trial steps
    of growing size go through the module's own `training_step` (forward, backward, clipping; the optimizers' state is
    there) and `validation_step`. Sizes are doubled while that brings speed. What fits is predicted from the sizes
    tried; on a GPU it is then found by tries, on the host nothing beyond the margin is tried. Where the host's memory
    decides, large blocks are mapped one by one from then on (`map_large_blocks`), so that the answer holds. Nothing
    else of the run changes: weights, gradients, optimizers, schedules, random numbers, modes and what lists, dicts and
    tensors of the module hold are put back. Each rank searches on its own, then all take the smallest size of any: a
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
        micro_batch_size: the one in effect, or None.
        reason: why, in one line.

    Raises:
        RuntimeError: at the start of training: memory was not given back after a trial step ran out of it.
    """

    def __init__(
        self,
        config: MemoryConfig = MemoryConfig(),
        cache_dir: str | Path | None = None,
    ) -> None:
        self.config = config
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._sizes = MicroBatchSizes(folder if config.cache else None)
        self._reset()

    def _reset(self) -> None:
        self.micro_batch_size: int | None = None
        self.reason = "no training step was made"
        self._source: SupportsMicroBatchSize | None = None
        self._key: str | None = None
        self._found: dict[str, Any] = {}
        self._from_cache = False

    def describe(self) -> dict[str, Any]:
        """Size and reason, and the figures behind them as plain data; memory in bytes, above what is held anyway.

        `tried` lists (size, peak, seconds) of each trial step, None where it failed; `peak` is the size's own.
        """
        figures = {name: self._found.get(name) for name in ("tried", "peak", "limit", "limit_bytes", "mapped")}
        setting = {"safety_margin": self.config.safety_margin, "from_cache": self._from_cache}
        return {"micro_batch_size": self.micro_batch_size, "reason": self.reason, **setting, **figures}

    # ------------------------------------------------------------------ finding

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the size up, or search it, and hand it to the batch source."""
        self._reset()
        source = batch_source(trainer, pl_module)
        if source is None or not hasattr(source, "worst_case_batch"):
            self.reason = (
                "no micro-batch size: neither data module nor module is a batch source (see SupportsMicroBatchSize)"
            )
            log_once(self.reason, logging.WARNING)
            return
        if not getattr(source, "auto_micro_batch_size", True):
            self.reason = "the micro-batch size is the user's"
            return
        known = limits(pl_module.device, _given(self.config))
        self._key = self._make_key(trainer, pl_module, source, known)
        entry = self._sizes.get(self._key)
        self._from_cache = entry is not None
        if entry is None:
            entry = self._find(trainer, pl_module, source, known)
        elif entry["mapped"]:
            map_large_blocks()
        entry = {**entry, "micro_batch_size": _smallest(entry["micro_batch_size"], pl_module.device)}
        self._found, self._source = entry, source
        self.micro_batch_size, self.reason = entry["micro_batch_size"], entry["reason"]
        source.set_micro_batch_size(self.micro_batch_size)
        if not self._from_cache and entry["tried"]:
            self._sizes.put(self._key, entry)
        log_once(
            f"micro-batch size {self.micro_batch_size:,}: {self.reason}",
            logging.INFO if entry["fits"] else logging.WARNING,
        )

    def _make_key(
        self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize, known: list[Limit]
    ) -> str:
        # not the memory of the machine: it is nobody's decision, and others use it too
        totals = sorted((limit.name, limit.total) for limit in known if limit.stated or limit.raises)
        data = {
            "key": getattr(source, "micro_batch_size_key", None),
            "step": getattr(source, "micro_batch_size_step", 1),
        }
        config = {name: value for name, value in asdict(self.config).items() if name != "cache"}
        setting = {**describe_step(trainer, module), "data": data, "limits": totals, "config": config}
        if module.device.type == "cpu" and (most := cache_bytes()[1]):
            setting["caches"] = most
        return digest(setting)

    def _find(
        self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize, known: list[Limit]
    ) -> dict[str, Any]:
        meter = make_meter(module.device, address_space=any(limit.raises for limit in known))
        hindrance = obstacle(trainer)
        if module.device.type == "cpu" and not any(limit.stated for limit in known):
            hindrance = "no limit on memory is stated (memory.limit_gb, control group, RLIMIT)"
        elif hindrance is None and isinstance(meter, str):
            hindrance = meter
        if hindrance is not None or isinstance(meter, str):
            return {"micro_batch_size": self.config.default_size, "reason": str(hindrance), **_NOTHING}
        step = getattr(source, "micro_batch_size_step", 1)
        with Probe(trainer, module, lambda units, train: source.worst_case_batch(units * step, train), meter) as probe:
            if probe.prepare():
                return self._search(probe, module.device, step)
        reason = f"not even this fits ({probe.failure}); what saves memory is activation checkpointing, a shorter "
        reason += "maximum length or a smaller model"
        return {"micro_batch_size": step, "reason": reason, **_NOTHING, "tried": [(step, None, None)], "fits": False}

    def _search(self, probe: Probe, device: torch.device, step: int) -> dict[str, Any]:
        """Where there is plenty of memory speed decides; else the host's blocks are mapped, so that answers hold."""
        config, tried = self.config, []
        on_host = device.type == "cpu"

        def room() -> Room:
            return _room(limits(device, _given(config)), on_host)

        for roomy in (True, False) if on_host else (False,):
            if not roomy and on_host:
                map_large_blocks()
                release()
            default = config.default_size // step
            search = Search(
                probe.attempt, room, config.safety_margin, config.min_speedup, default, step, probe.meter.noise
            )
            answer = search.run_where_roomy() if roomy else search.run()
            tried += search.tried
            if answer is not None:
                break
        assert answer is not None
        return _entry(answer, search, limits(device, _given(config))[0], step, tried, mapped=on_host and not roomy)

    # ------------------------------------------------------------------ learning from what went wrong

    def lower(self, size: int) -> None:
        """Keep a smaller size than was found, for this run and later ones; a larger one is ignored.

        Args:
            size: one that is hoped to fit.
        """
        if self.micro_batch_size is None or self._key is None or size >= self.micro_batch_size:
            return
        self._found = {
            **self._found,
            "micro_batch_size": size,
            "reason": f"lowered from {self.micro_batch_size:,} after an OOM",
        }
        self.micro_batch_size, self.reason = size, self._found["reason"]
        self._sizes.put(self._key, self._found)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Learn where the size in effect was lowered."""
        if self._source is not None:
            self.lower(self._source.micro_batch_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Learn where the size in effect was lowered; an `OOMHandler` calls `lower` if it lowers it later than this."""
        self.on_train_batch_end()


def _given(config: MemoryConfig) -> int | None:
    return None if config.limit_gb is None else round(config.limit_gb * GIB)


def _room(known: list[Limit], on_host: bool) -> Room:
    """On the host nothing is tried beyond a limit, even where that raises an error.

    Where oneDNN is the one that asks in vain, it can make no new kernel in that thread for the rest of the process.
    What others may yet take of the host's memory to save time is left to them, so that answers hold when they do.
    """
    promised = cache_bytes()[0] if on_host else 0
    hard = [limit.free for limit in known if limit.raises and not on_host]
    soft = [max(limit.free - promised, 0) for limit in known if not limit.raises or on_host]
    return Room(min(hard, default=None), min(soft, default=None))


def _entry(
    answer: Answer,
    search: Search,
    limit: Limit,
    step: int,
    tried: list[tuple[int, int | None, float | None]],
    mapped: bool,
) -> dict[str, Any]:
    peak = search.peak(max(answer.units, 1))
    figures = (
        f"peak about {format_bytes(min(limit.used + peak, limit.total))} of {format_bytes(limit.total)} ({limit.name})"
    )
    return {
        "micro_batch_size": max(answer.units, 1) * step,
        "reason": f"{answer.reason}; {figures}",
        "fits": answer.units > 0,
        "mapped": mapped,
        "tried": [(units * step, at, seconds) for units, at, seconds in tried],
        "peak": peak,
        "limit": limit.name,
        "limit_bytes": limit.total,
    }


def _smallest(size: int, device: torch.device) -> int:
    """Of all ranks, so that they agree."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return size
    found = torch.tensor([size], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found.item())
