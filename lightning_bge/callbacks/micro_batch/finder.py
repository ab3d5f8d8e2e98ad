"""The largest micro-batch that fits into memory and pays, found by trial steps before training starts."""

import logging
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch import Tensor

from lightning_bge.callbacks.micro_batch.cache import FoundSize, MicroBatchSizes, describe_step, digest
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.dataloader_source import DataLoaderSource
from lightning_bge.callbacks.micro_batch.heap import choose_heap
from lightning_bge.callbacks.micro_batch.probe import Probe, make_meter
from lightning_bge.callbacks.micro_batch.search import Search
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.memory import (
    SMALLEST_HEAP,
    Limit,
    cache_bytes,
    limit_malloc,
    limits,
    release,
    unreserved_use,
)
from lightning_bge.runtime.micro_batch import SupportsMicroBatchSize, batch_source
from lightning_bge.runtime.units import format_bytes

log = logging.getLogger(__name__)

NOT_EVEN = "not even this fits"
SHORTEST_S = 0.05  # what Lightning itself does for a batch, about 1 ms, is no part of the time of a trial step
CONTEXT_BYTES = 2**30  # CUDA's own, of this process, at most


class MicroBatchFinder(Callback):
    """Finds the largest micro-batch that fits and pays, before training starts, and has the run use it.

    For an ordinary module with automatic optimization, and an attribute `batch_size` that its loaders are made with, it
    takes the place of Lightning's `BatchSizeFinder`. It sets a smaller or larger batch size, and
    `accumulate_grad_batches`, so that each optimizer step has the mean loss over the `batch_size *
    accumulate_grad_batches` rows that were asked for, whatever fits (see `DataLoaderSource`). That holds for the last,
    smaller effective batch of an epoch too, whose losses are scaled. Trial batches are made of the largest samples of
    the training dataset, among 1,024 of them. They are made when `fit` starts, before the sanity check; callbacks that
    change the module come before this one. When `fit` ends, module and trainer have what was asked for again. A
    run that is resumed keeps the size of its checkpoint.

    A batch source (see `SupportsMicroBatchSize`) makes its batches itself, and tells of the largest ones: the trainer's
    data module, or else the LightningModule. Its size is looked for when training starts: by then precision, attention,
    compiled layers, train mode, weights and optimizers are those of the run.

    Trial steps of growing size go through the module's own `training_step` (forward, backward, clipping; the
    optimizers' state is there) and `validation_step`. Sizes are doubled while that brings speed. On a GPU what fits is
    then found by bisection; on the host, and under `limit_gb`, it is predicted from the sizes tried, and nothing beyond
    the margin is tried. Nothing else of the run changes: weights, gradients, optimizers, schedules, random numbers,
    modes and what lists, dicts and tensors of the module hold are restored. Each rank searches on its own, then all
    take the smallest size of any: a module whose steps wait for other ranks has a method `trial_steps` that returns a
    context, in which they do not.
    What was found is cached by all that the memory of a step depends on; a second run makes no trial step.

    On a CPU without a stated limit, and where memory can't be measured or steps can't be tried alone (as with sharded
    strategies), a batch source gets `default_size`, and an ordinary module keeps its batch size.

    Args:
        config: limit, margin, when to stop.
        cache_dir: folder in which `micro_batch_sizes` is made. None: the environment variable LIGHTNING_BGE_CACHE, else
            ~/.cache/lightning-bge.
        batch_arg_name: the attribute with the batch size, which is looked for in the module, its hparams, and the data
            module, as `BatchSizeFinder` does.

    Attributes:
        micro_batch_size: the size in effect; None before training, and where this callback does not set it.
        reason: why, in one line.
        tried: (size, peak, seconds) of each trial step; peak (bytes above what is held anyway) and seconds are None
            where it failed. Empty where the size was cached.

    Raises:
        ConfigError: at the start of `fit`: an ordinary module whose loaders are not made with its batch size.
    """

    def __init__(
        self,
        config: MemoryConfig = MemoryConfig(),  # noqa: B008 - frozen
        cache_dir: str | Path | None = None,
        batch_arg_name: str = "batch_size",
    ) -> None:
        self.config, self.batch_arg_name = config, batch_arg_name
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._sizes = MicroBatchSizes(folder if config.cache else None)
        self._of_checkpoint: dict[str, Any] = {}
        self._reset()

    def _reset(self, reason: str = "no training step was made") -> None:
        self.micro_batch_size: int | None = None
        self.reason = reason
        self.tried: list[tuple[int, int | None, float | None]] = []
        self._source: SupportsMicroBatchSize | None = None
        self._loaders: DataLoaderSource | None = None
        self._batch_idx = 0
        self._key = ""
        self._heap: int | None = None

    # ------------------------------------------------------------------ finding

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the batch size of an ordinary module, before its loaders are made."""
        self._reset()
        if _is_own_source(trainer, pl_module) or not pl_module.automatic_optimization:
            return
        if not lightning_hasattr(pl_module, self.batch_arg_name):
            return
        if _is_skipped(trainer):
            self.reason = "trainer.fast_dev_run, or no training batches: the batch size stays"
            return
        loaders = DataLoaderSource(trainer, pl_module, self.batch_arg_name)
        if trainer.ckpt_path is None:
            self._set(trainer, pl_module, loaders)
        else:  # its loops count batches of the size that it was trained with
            size = self._of_checkpoint.get("micro_batch_size")
            self.micro_batch_size = size if size in loaders.sizes else loaders.micro_batch_size
            self.reason, self._heap = "as in the checkpoint", self._of_checkpoint.get("heap")
            self._look_up(trainer, pl_module, loaders)  # makes the key
            limit_malloc(self._heap)
            loaders.set_micro_batch_size(self.micro_batch_size)
        self._source = self._loaders = loaders

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the size for a batch source; check the loader of an ordinary module."""
        if self._loaders is not None:
            self._loaders.check()
            return
        source = batch_source(trainer, pl_module)
        if source is None or not _is_own_source(trainer, pl_module):
            if not _is_skipped(trainer):
                self._reset(
                    "no micro-batch size: neither data module nor module is a batch source (see "
                    f"SupportsMicroBatchSize), or optimized automatically with an attribute {self.batch_arg_name}"
                )
                log_once(log, logging.WARNING, self.reason)
            return
        self._reset()
        if not getattr(source, "auto_micro_batch_size", True):
            self.reason = "the micro-batch size is the user's"
            return
        self._set(trainer, pl_module, source)
        self._source = source

    def _set(self, trainer: Trainer, pl_module: LightningModule, source: SupportsMicroBatchSize) -> None:
        """Look the size up, or search it, and hand it to the batch source."""
        limit_malloc()
        found = self._look_up(trainer, pl_module, source)
        is_new = found is None
        if found is None:
            found = self._find(trainer, pl_module, source, limits(pl_module.device, self.config.limit_bytes))
        size, self._heap = _smallest(found, pl_module.device)
        self.reason = found.reason
        limit_malloc(self._heap)
        if isinstance(source, DataLoaderSource):
            size = source.largest_size(size)
        self.micro_batch_size = size
        source.set_micro_batch_size(size)
        if is_new and self.tried:
            self._sizes.put(self._key, FoundSize(size, self.reason, self._heap))
        level = logging.WARNING if self.reason.startswith(NOT_EVEN) else logging.INFO
        log_once(log, level, f"micro-batch size {size:,}: {self.reason}")

    def _look_up(self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize) -> FoundSize | None:
        """What was found before, by a key for all that the answer depends on."""
        known = limits(module.device, self.config.limit_bytes)
        # not the memory of the machine: it was not set for this process, and others use it too
        totals = sorted((limit.name, limit.total) for limit in known if limit.stated or limit.raises)
        data = {name: getattr(source, f"micro_batch_size_{name}", None) for name in ("key", "step")}
        config = {name: value for name, value in asdict(self.config).items() if name != "cache"}
        content = {**describe_step(trainer, module), "data": data, "limits": totals, "config": config}
        if not any(limit.stated for limit in known):  # else the rest of the device is not this process's
            content["others"] = others_share(module.device)
        if module.device.type == "cpu" and (most := cache_bytes()[1]):
            content["caches"] = most
        self._key = digest(content)
        return self._sizes.get(self._key)

    def _find(
        self, trainer: Trainer, module: LightningModule, source: SupportsMicroBatchSize, known: list[Limit]
    ) -> FoundSize:
        config, device = self.config, module.device
        meter = make_meter(trainer, device, address_space=any(limit.raises for limit in known))
        if device.type == "cpu" and not any(limit.stated for limit in known):
            meter = "no limit on memory is stated (memory.limit_gb, control group, RLIMIT)"
        loaders = source if isinstance(source, DataLoaderSource) else None
        if isinstance(meter, str):
            return FoundSize(config.default_size if loaders is None else loaders.micro_batch_size, meter)
        step = getattr(source, "micro_batch_size_step", 1)
        if device.type == "cpu":
            limit_malloc(SMALLEST_HEAP)
        with Probe(
            trainer,
            module,
            lambda units, train: source.worst_case_batch(units * step, train),
            meter,
            prefetched=loaders is not None,
        ) as probe:
            found = self._search(probe, step, loaders, device) if probe.prepare() else None
        if found is not None:
            return found
        smallest = step if loaders is None else loaders.sizes[0]
        self.tried = self.tried or [(smallest, None, None)]
        reason = (
            f"{NOT_EVEN} ({probe.failure or 'its peak is above the limit'}); gradient checkpointing, a shorter maximum "
            "length or a smaller model save memory"
        )
        return FoundSize(smallest, reason, SMALLEST_HEAP if device.type == "cpu" else None)

    def _search(
        self, probe: Probe, step: int, loaders: DataLoaderSource | None, device: torch.device
    ) -> FoundSize | None:
        """Try steps; None: not even the smallest fits."""
        config = self.config

        def measure_free() -> int | None:
            release()  # as before a trial step
            return _untried_bytes(limits(device, config.limit_bytes), device.type == "cpu")

        held = limits(device, config.limit_bytes)[0]
        options = _source_options(config, step) if loaders is None else _loader_options(config, loaders)
        margin, noise = config.safety_margin, probe.meter.noise
        search = Search(probe.attempt, measure_free, margin=margin, step=step, noise=noise, **options)
        answer, heap, least = search.run(), None, 1 if loaders is None else -(-loaders.least // step)
        if answer.units >= least and device.type == "cpu":
            trained = (lambda units: units) if loaders is None else partial(_trained_units, loaders, step)
            # where as much as fits is wanted, nothing smaller is
            smallest = least if config.min_speedup is not None else trained(answer.units)
            answer, heap = choose_heap(probe, search, answer, least=smallest, trained=trained)
        self.tried = [(units * step, peak, seconds) for units, peak, seconds in search.tried]
        if answer.units < least:
            return None
        return FoundSize(answer.units * step, f"{answer.reason}; {_describe_peak(answer.peak, held)}", heap)

    # ------------------------------------------------------------------ after an out-of-memory error

    def lower(self, size: int) -> None:
        """Keep a smaller size than was found, for this run and later ones; a larger one is ignored.

        Args:
            size: one that is expected to fit.
        """
        if self.micro_batch_size is None or size >= self.micro_batch_size:
            return
        self.reason = f"lowered from {self.micro_batch_size:,} after an OOM"
        self.micro_batch_size = size
        if self._heap is not None:
            self._heap = SMALLEST_HEAP  # as `clean_up` has set it
        self._sizes.put(self._key, FoundSize(size, self.reason, self._heap))

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Keep the size in effect where it was lowered."""
        if self._source is not None:
            self.lower(self._source.micro_batch_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the size in effect where it was lowered; an `OOMHandler` that comes later calls `lower`."""
        self.on_train_batch_end()
        self._restore()

    # ------------------------------------------------------------------ the effective batch of an ordinary module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which batch it is."""
        self._batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Scale the gradient of a batch whose share of the effective batch is not what Lightning divides by."""
        if self._loaders is not None and (factor := self._loaders.loss_factor(self._batch_idx)) != 1:
            loss.register_hook(lambda gradient: gradient * factor)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the batch size that was asked for."""
        if self._loaders is not None:
            self._loaders.restore_in(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """The batch size that the trainer's loops count in, and where its tensors come from."""
        if self._loaders is None:
            return {}
        return {"micro_batch_size": self._loaders.micro_batch_size, "heap": self._heap}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for the `fit` that is about to go on."""
        self._of_checkpoint = state_dict

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what was asked for."""
        self._restore()

    def _restore(self) -> None:
        if self._loaders is not None:
            self._loaders.restore()
        self._source, self._loaders, self._of_checkpoint = None, None, {}
        limit_malloc()


def _is_own_source(trainer: Trainer, module: LightningModule) -> bool:
    """Whether data module or module make worst-case batches themselves."""
    return hasattr(batch_source(trainer, module), "worst_case_batch")


def _is_skipped(trainer: Trainer) -> bool:
    """Whether there is nothing to search a size for."""
    return bool(trainer.fast_dev_run) or trainer.limit_train_batches == 0  # type: ignore[attr-defined]


def _source_options(config: MemoryConfig, step: int) -> dict[str, Any]:
    """Of `Search`, for a batch source."""
    return {"min_speedup": config.min_speedup, "default": config.default_size // step}


def _loader_options(config: MemoryConfig, loaders: DataLoaderSource) -> dict[str, Any]:
    """Of `Search`, for the rows of a loader.

    Half of `min_speedup` is asked for, as all further doublings together bring up to twice what one of them brings.
    """
    speedup = None if config.min_speedup is None else config.min_speedup / 2
    # if this fits, the margin is there
    largest = math.ceil(loaders.most / (1 - config.safety_margin) / loaders.micro_batch_size_step)
    return {"min_speedup": speedup, "default": 1, "largest": largest, "shortest_s": SHORTEST_S}


def _describe_peak(peak: int, limit: Limit) -> str:
    used = format_bytes(min(limit.used + peak, limit.total))
    return f"peak about {used} of {format_bytes(limit.total)} ({limit.name})"


def _untried_bytes(known: list[Limit], on_host: bool) -> int | None:
    """Free bytes below the limits that must not be tried; None where each limit raises an error without harm.

    On the host no limit is tried: where an allocation of oneDNN fails, it can make no new kernel in that thread for the
    rest of the process. What caches may yet fill of the host's memory is left to them, so that answers hold when they
    do.
    """
    promised = cache_bytes()[0] if on_host else 0
    return min((max(limit.free - promised, 0) for limit in known if on_host or not limit.raises), default=None)


def others_share(device: torch.device) -> int:
    """How many eighths of a GPU's memory other processes hold, rounded up; 0 on other devices.

    A size that was found while others used the device must not be taken when it is free, nor the other way round.
    """
    if device.type != "cuda":
        return 0
    others, total = unreserved_use(device)
    return -(-8 * max(0, others - CONTEXT_BYTES) // total)


def _smallest(found: FoundSize, device: torch.device) -> tuple[int, int | None]:
    """The smallest size of all ranks, and the smallest setting of the heap."""
    size, heap = found.micro_batch_size, found.heap
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return size, heap
    values = torch.tensor([size, heap or 0], device=device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MIN)
    size, least = values.tolist()
    return size, least or None


def _trained_units(loaders: DataLoaderSource, step: int, units: int) -> int:
    """Units of the batches that a loader makes where so many fit."""
    return min(loaders.largest_size(units * step), loaders.rows) // step
