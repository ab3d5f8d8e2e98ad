"""Trial steps on worst-case batches through the real code path, and what they take."""

from __future__ import annotations

import gc
import inspect
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_bge.callbacks.micro_batch.search import TrialStep
from lightning_bge.callbacks.micro_batch.state import Kept
from lightning_bge.runtime.compat.lightning import is_strategy, on_before_batch_transfer
from lightning_bge.runtime.memory import process_bytes, release
from lightning_bge.runtime.oom import find_oom

_clock = time.perf_counter
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # resets VmHWM, see proc_pid_clear_refs(5)


class HostMeter:
    """Measures the memory of this process, as Linux counts it, and the time of a step.

    Args:
        address_space: whether address space is limited, of which a process takes more than becomes resident. Its peak
            can't be reset: it counts where it is a new one, as it is near the limit in a search that goes upwards.

    Attributes:
        noise: bytes by which a peak may be wrong.
    """

    noise = 4 * 2**20  # code that is run for the first time becomes resident, too

    def __init__(self, address_space: bool) -> None:
        self._address_space = address_space
        self._before = process_bytes()

    def start(self) -> None:
        """Reset VmHWM, which needs no privilege."""
        _CLEAR_REFS.write_text(_RESET_PEAK)
        self._before = process_bytes()

    def peak(self) -> int:
        """Bytes: VmHWM above VmRSS at the start, or VmPeak above VmSize then, whichever is more."""
        before, now = self._before, process_bytes()
        resident = now["VmHWM"] - before["VmRSS"]
        is_new = self._address_space and now["VmPeak"] > before["VmPeak"]
        return max(resident, now["VmPeak"] - before["VmSize"] if is_new else 0, 0)

    def now(self) -> float:
        """Seconds."""
        return _clock()


class CudaMeter:
    """As `HostMeter`, of what torch's allocator reserves, which is what the GPU lacks, and more than tensors fill."""

    noise = 2 * 2**20  # the allocator's smallest segment

    def __init__(self, device: torch.device) -> None:
        self._device, self._base = device, 0

    def start(self) -> None:
        """Reset the allocator's peaks; blocks of other sizes, which it keeps, would be counted too."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._base = torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        """Reserved bytes above those at the start."""
        return max(torch.cuda.max_memory_reserved(self._device) - self._base, 0)

    def now(self) -> float:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)
        return _clock()


Meter = HostMeter | CudaMeter


def make_meter(trainer: Trainer, device: torch.device, address_space: bool = False) -> Meter | str:
    """What measures trial steps on a device; or why none can be made or measured.

    Args:
        trainer: whose steps are to be tried outside of Lightning's loops.
        device: the training device.
        address_space: whether the host's address space is limited.
    """
    if not is_strategy(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        return f"a step can't be tried alone under {type(trainer.strategy).__name__}"
    if device.type == "cuda":
        return CudaMeter(device)
    if device.type != "cpu" or sys.platform != "linux":
        return f"the peak of memory can't be measured on {device.type} under {sys.platform}"
    meter = HostMeter(address_space)
    try:
        meter.start()
    except OSError as error:
        return f"the peak of memory can't be measured: {error}"
    return meter


class Probe:
    """Tries training and validation steps of any size; a context that restores everything, whatever happens.

    On entry the smallest step is made twice: with the optimizers, so that their state is there, and without. From then
    on optimizers do not step: what a step takes does not depend on the batch. Before each step gradients are there, as
    they are within an effective batch of several.

    Args:
        trainer: in `fit`.
        module: its module; with DistributedDataParallel the one inside.
        make_batch: makes a worst-case batch of so many units, for training or not, on the host.
        meter: measures.
        prefetched: batches that Lightning's loop holds while a training step runs, besides its own.

    Attributes:
        failure: a description of the last failed allocation; None: nothing failed.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        make_batch: Callable[[int, bool], Any],
        meter: Meter,
        prefetched: int = 0,
    ) -> None:
        self.trainer, self.module, self.make_batch, self.meter = trainer, module, make_batch, meter
        self.prefetched = prefetched
        self.failure: str | None = None
        self._with_gradients: list[Tensor] = []
        self._validates = trainer.enable_validation

    def __enter__(self) -> Probe:
        self._kept = Kept(self.trainer, self.module)
        gc.collect()
        self._frozen = gc.get_freeze_count() == 0
        if self._frozen:  # what is there now need not be walked each time: that takes up to a second
            gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        if self._frozen:
            gc.unfreeze()
        self._kept.restore()
        release()

    def prepare(self) -> bool:
        """Create the optimizers' state, so that it is held between steps; False: out of memory."""
        kept = self._kept
        kept.stop_optimizers(every=False)
        made = self.attempt(1)
        kept.restore_weights()
        kept.stop_optimizers()
        if made is None or self.attempt(1) is None:
            return False
        if kept.weights_changed():  # by the module itself, outside of optimizers
            kept.restore_weights()
        else:
            kept.weights = None
        self._with_gradients = kept.trainable()
        release()
        return True

    def attempt(self, units: int, validate: bool = True) -> TrialStep | None:
        """Make a training step, and a validation step; None: out of memory, and all memory of the step was freed."""
        if validate:  # else it is for the time alone, and training does not trim
            release()
        try:
            return self._step(units, validate)
        except Exception as error:
            found = find_oom(error, "the search for a batch size")
            if found is None:
                raise
            self.failure = str(found)
        finally:
            self._kept.reset()
        if not self._with_gradients:
            self._kept.drop_state()  # it may have been made in part
        release()
        return None

    # ------------------------------------------------------------------ steps

    def _step(self, units: int, validate: bool) -> TrialStep:
        trainer, meter = self.trainer, self.meter
        meter.start()
        batch = self._move(self.make_batch(units, True))
        prefetched = [self.make_batch(units, True) for _ in range(self.prefetched)]
        for parameter in self._with_gradients:
            # written, as a page of zeros that was never written takes no memory
            parameter.grad = torch.empty_like(parameter).zero_()
        begin = meter.now()
        model = trainer.strategy.model
        still = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        with still:
            if self.module.automatic_optimization:
                self._train_automatically(batch)
            else:
                with trainer.precision_plugin.train_step_context():
                    _call(self.module.training_step, batch)
        seconds = meter.now() - begin
        del batch, prefetched
        if validate and self._validates:
            self._validate(self._move(self.make_batch(units, False)))
        meter.now()
        return TrialStep(units, meter.peak(), seconds)

    def _train_automatically(self, batch: Any) -> None:
        """Do what Lightning's loop does for one optimizer, with the gradients of the step before."""
        strategy = self.trainer.strategy
        optimizer = next(iter(self.trainer.optimizers), None)

        def closure() -> Tensor | None:
            with strategy.precision_plugin.train_step_context():
                output = _call(self.module.training_step, batch)
            loss = output["loss"] if isinstance(output, Mapping) else output
            return None if loss is None else strategy.backward(loss, optimizer)

        if optimizer is None:
            closure()
        else:
            strategy.optimizer_step(optimizer, closure, model=self.module)

    def _validate(self, batch: Any) -> None:
        self.module.eval()
        self.trainer.validating = True
        try:
            with self._no_gradients(), self.trainer.precision_plugin.val_step_context():
                _call(self.module.validation_step, batch)
        finally:
            self.trainer.training = True

    def _no_gradients(self) -> AbstractContextManager[None]:
        """The context in which Lightning's loop validates."""
        gloo = torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
        wanted = self.trainer.fit_loop.epoch_loop.val_loop.inference_mode and not gloo
        return torch.inference_mode() if wanted else torch.no_grad()

    def _move(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = on_before_batch_transfer(self.module, batch)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _call(step: Callable[..., Any], batch: Any) -> Any:
    """Call a step with a batch and a zero for each index that it takes."""
    parameters = inspect.signature(step).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return step(batch, *[0] * (max(len(needed), 2 * any_number) - 1))
