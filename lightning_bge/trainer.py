"""The trainer as this program sets it up: for one run that keeps everything, and for a fold that keeps nothing."""

import copy
import logging
import zipfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.strategies import Strategy

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.callbacks.throughput.bar import ThroughputProgressBar
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.callbacks.torch_backends import TorchBackends, choose_precision, chosen_device
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.trial.fold_callbacks import early_stopping
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.trainer_options import TrainerOptions
from lightning_bge.runtime.callback_kinds import (
    NEEDS_TRAINING,
    NOT_IN_TRIALS,
    UNUSABLE,
    Given,
    callback_list,
    is_kind,
    without_kinds,
)
from lightning_bge.runtime.distributed import choose_strategy

log = logging.getLogger("lightning_bge")

# Warnings of Lightning on which nobody can act here.
HARMLESS_WARNINGS = (
    ".*does not have many workers.*",  # rows are tokenized and in memory: 0 workers are the fastest
    ".*Checkpoint directory .* exists and is not empty.*",  # a run folder in which a run continues
    ".*number of training batches.*smaller than the logging interval.*",
    ".*`srun` command is available.*",  # on a machine of a Slurm cluster: no process here needs to be started by it
    ".*WeightAveraging callback with a model that overrides the configure_model.*",  # about sharded models
    ".*`tensorboardX` has been removed as a dependency.*",  # of a trainer's default logger: ours is the CSVLogger
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6.6 under torch 2.13
)

MODULE_DEFAULTS = {"devices": 1, "num_sanity_val_steps": 0}  # Lightning's: all devices, and a check in each fold
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")  # arguments

Precision = Literal["auto", "bf16-mixed", "16-mixed", "32-true"]


class BGETrainer(Trainer):
    """Lightning's Trainer, on one device by default, in the precision that is fastest on this machine.

    Args:
        precision: auto takes bf16-mixed (fp32 weights, bf16 matrix products) where the hardware multiplies bf16
            matrices, 16-mixed (fp16 products with loss scaling, for CUDA devices) where a GPU multiplies fp16 matrices
            alone (V100, T4), else 32-true, and says which and why.
        accelerator: cpu, gpu, mps ..., or auto.
        callbacks: further callbacks; `TorchBackends` and a progress bar are added where there is none.
        devices: number of devices, or their indices; each of several has a process and a share of each batch.
        strategy: auto or ddp; both are `UnwrappedDDP` on several devices.
        num_sanity_val_steps: validation batches before the first epoch; 0, as they cost time in every fold.
        limit_train_batches: a number of batches (1), or a part of an epoch (1.0), that is trained on: a dry run, of
            which `fit` keeps nothing. This and the next five are Lightning's. They are named here because Lightning's
            annotations are `Union[int, float]`, of which Python may make `Union[float, int]`, and the command line
            then 1.0 of 1.
        limit_val_batches: the same for validation.
        limit_test_batches: the same for the test file.
        limit_predict_batches: the same for predictions.
        overfit_batches: train on the first so many batches, or on such a part, in every epoch, and validate on as many
            validation batches: a dry run.
        val_check_interval: validate after so many steps, or after such a part of an epoch.
    """

    def __init__(
        self,
        *args: Any,
        precision: Precision = "auto",
        accelerator: str | Accelerator = "auto",
        callbacks: list[Callback] | Callback | None = None,
        devices: int | list[int] | str = 1,
        strategy: str | Strategy = "auto",
        num_sanity_val_steps: int = 0,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("barebones"):
            raise ConfigError("trainer.barebones: expected false, got true: no metric would be logged. Leave it out")
        if precision == "auto":
            # `TorchBackends` says which, and why
            precision, _ = choose_precision(str(accelerator))  # type: ignore[assignment]
        if precision == "16-mixed" and (device := chosen_device(str(accelerator))).type != "cuda":
            # Lightning would take bf16-mixed on a CPU, after a warning
            fastest, why = choose_precision(str(accelerator))
            raise ConfigError(
                f"trainer.precision: 16-mixed needs a CUDA device, the run is on {device.type}. Set {fastest} ({why}), "
                "or auto"
            )
        callbacks = callback_list(callbacks)
        if not any(isinstance(callback, TorchBackends) for callback in callbacks):
            callbacks.insert(0, TorchBackends())  # TF32 for what remains in fp32, for the length of a run
        silent = kwargs.get("enable_progress_bar") is False
        if not silent and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(ThroughputProgressBar())
        super().__init__(
            *args,
            accelerator=accelerator,
            callbacks=callbacks,
            precision=precision,  # type: ignore[arg-type]
            devices=devices,
            strategy=choose_strategy(strategy, devices, kwargs.get("num_nodes", 1), accelerator),
            num_sanity_val_steps=num_sanity_val_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )


def take_options(trainer: Mapping[str, Any], model: BGEClassifier, data: TextDataModule) -> None:
    """Check what the module takes over of a trainer's arguments, before a run begins, and count steps accordingly.

    Args:
        trainer: the arguments.
        model: as configured.
        data: learns how many of its batches make an optimizer step.

    Raises:
        ConfigError: see `TrainerOptions`.
    """
    options = TrainerOptions.of(trainer)
    options.max_grad_norm(model.max_grad_norm)
    data.accumulated = options.accumulate_grad_batches


def warn_of_unused_callbacks(callbacks: Given, command: str, *, evaluates: bool = False) -> None:
    """Log a line for each of the user's callbacks that a command can't use.

    Args:
        callbacks: those of the options.
        command: its name, for the message.
        evaluates: whether it trains nothing.
    """
    kinds = NEEDS_TRAINING if evaluates else NOT_IN_TRIALS
    reason = "trains nothing" if evaluates else "has no logger, and stops and saves trials itself (monitor.patience)"
    reasons: dict[str, str] = {}  # one for several of a name
    for callback in callback_list(callbacks):
        if isinstance(callback, kinds):
            unusable = [fix for kind, fix in UNUSABLE.items() if is_kind(type(callback), (kind,)) and not evaluates]
            reasons[type(callback).__name__] = unusable[0] if unusable else f"{command} {reason}"
    for name, why in reasons.items():
        log.info("trainer.callbacks: %s is left out, as %s", name, why)


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint of a run folder, apart from those of the user's callbacks; the folder may be moved meanwhile."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the checkpoints of these names in the folder that this callback writes into."""
        state = {**state_dict, "dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = self._here(state[name])
        state["best_k_models"] = {self._here(path): value for path, value in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath), Path(path).name)) if path else path


class BestCheckpoint(RunCheckpoint):
    """The best epoch, which is exported, and the last one."""


class RecentCheckpoint(RunCheckpoint):
    """A recent moment, from which a killed run goes on."""


def fit_callbacks(
    run_dir: Path, monitor: MonitorConfig, compile_config: CompileConfig, memory: MicroBatchFinder
) -> list[Callback]:
    """The largest micro-batch, early stopping, tokens per second, compiling where it pays, and checkpoints."""
    return [
        *[OOMHandler(), memory, *early_stopping(monitor), Throughput(), CompileLayers(compile_config)],
        *run_checkpoints(run_dir, monitor),
    ]


def run_checkpoints(run_dir: Path, monitor: Monitor) -> list[Callback]:
    """The checkpoints of a run: the best epoch, the last one, and one every ten minutes."""
    mode = "max" if monitor.direction == "maximize" else "min"
    folder = run_dir / "checkpoints"
    best = BestCheckpoint(folder, "best", monitor=monitor.logged, mode=mode, save_last=True)
    recent = RecentCheckpoint(folder, "recent", train_time_interval=timedelta(minutes=10), enable_version_counter=False)
    return [best, recent]


def check_checkpoints(arguments: dict[str, Any], run_dir: Path) -> None:
    """Refuse arguments of the trainer with which a run could not keep its checkpoints.

    Raises:
        ConfigError: `enable_checkpointing` is off, or a callback of the user's writes among the checkpoints of the run.
    """
    if arguments.get("enable_checkpointing") is False:
        raise ConfigError(
            "trainer.enable_checkpointing: expected true for fit, got false: the best epoch is exported from its "
            "checkpoint. Leave it out"
        )
    folder = (run_dir / "checkpoints").resolve()
    for callback in callback_list(arguments.get("callbacks")):
        given = None if isinstance(callback, RunCheckpoint) else getattr(callback, "dirpath", None)
        if isinstance(callback, Checkpoint) and given is not None and Path(given).resolve() == folder:
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__}.dirpath is {given}, where the run keeps its own "
                "checkpoints. Name another folder"
            )


def newest_checkpoint(run_dir: Path) -> str | None:
    """The checkpoint to resume from: that of the last epoch's end, or a later one within an epoch.

    Raises:
        StudyError: a checkpoint is damaged.
    """
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        if not zipfile.is_zipfile(path):  # as torch writes them; one that was cut off is none
            raise StudyError(
                f"{path} is damaged: expected a checkpoint. Delete it, and the run goes on from another one, or begins "
                "anew where there is none"
            )
    found = [path for name in ("last", "recent") if (path := run_dir / "checkpoints" / f"{name}.ckpt").is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def module_trainer(kind: type[Any], config: Mapping[str, Any], callbacks: list[Callback], **changes: Any) -> Trainer:
    """A trainer for one fold of a module that is not ours, with the user's arguments, and as silent as `quiet_trainer`.

    Args:
        kind: the class of the trainer, of the package that the module's classes are of.
        config: the user's arguments.
        callbacks: what a trial needs besides the user's.
        changes: further arguments.
    """
    given = without_kinds(config.get("callbacks"), NOT_IN_TRIALS)
    off = dict.fromkeys(SILENT, False)
    trainer: Trainer = kind(**{**config, **off, **changes, "callbacks": [*given, *callbacks]})
    return trainer


def quiet_trainer(config: dict[str, Any], memory: MicroBatchFinder | None = None, **changes: Any) -> Trainer:
    """A trainer for one fold: no logger, checkpoints or progress bar, which cost more than a small model's epoch."""
    given = without_kinds(config.get("callbacks"), NOT_IN_TRIALS)
    callbacks = [
        # an average of weights goes on from fold to fold, unless each has a callback of its own
        *(copy.deepcopy(one) if isinstance(one, WeightAveraging) else one for one in given),
        *changes.pop("callbacks", []),
        *([] if memory is None else [memory]),
    ]
    return BGETrainer(**{**config, **dict.fromkeys(SILENT, False), "callbacks": callbacks, **changes})
