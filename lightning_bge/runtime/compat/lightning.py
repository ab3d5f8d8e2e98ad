"""What this package needs of Lightning that has no public name: one function each, with its reason."""

import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _get_sigkill_signal
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from lightning_bge.errors import ConfigError

PACKAGES = ("lightning", "pytorch_lightning")  # the same library under two names, with classes of their own
# of its messages; where both packages are imported, those of either go to the one that was imported last
LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def on_before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """Apply the hook of that name, of the data module or the module, whichever overrides it.

    Lightning applies it where a loader yields a batch; no public function does it for a batch made elsewhere.
    """
    return module._on_before_batch_transfer(batch)


def train_loader(trainer: Trainer) -> Any:
    """The training loader as the module or data module makes it, with the sampler of a distributed run.

    The trainer's own one exists later only, and has been iterated then, which draws random numbers.

    Raises:
        ConfigError: it was passed to `fit`, so that no other can be made.
    """
    source = trainer.fit_loop._data_source
    if not source.is_module():
        raise ConfigError(
            "MicroBatchFinder: expected a method train_dataloader of the module or data module, got a loader passed to "
            "fit, which can't be made anew with another batch size"
        )
    loader = source.dataloader()
    return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of validation as they were passed to `fit`, or as the module or data module makes them."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    found = source.dataloader() if source.is_defined() else None
    return [] if found is None else CombinedLoader(found, "sequential").flattened


def drop_loaders(trainer: Trainer) -> None:
    """Have the trainer make its training and validation loaders anew, before it needs them."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def lightning_bases(kind: type) -> set[str]:
    """The names of Lightning's classes that a class is derived from, of either package, and its own if it is one."""
    return {base.__name__ for base in kind.__mro__ if base.__module__.partition(".")[0] in PACKAGES}


def is_strategy(strategy: Any, *names: str) -> bool:
    """Whether a strategy is one of those classes of Lightning, or derived from one; DeepSpeed is none of them.

    By name, as the package `pytorch_lightning` has classes of its own.
    """
    bases = lightning_bases(type(strategy))
    return not bases.isdisjoint(names) and "DeepSpeedStrategy" not in bases


@contextmanager
def silenced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """A context in which the trainer has no callbacks, its loggers write nothing, and `module.log` does nothing.

    A step made outside of Lightning's loops must not be seen by callbacks and loggers, and `log` raises there.
    """
    callbacks, loggers, before = trainer.callbacks, list(trainer.loggers), dict(vars(module))  # type: ignore[attr-defined]
    trainer.callbacks = []  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger() for _ in loggers]
    vars(module).update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
            if name in before:
                vars(module)[name] = before[name]


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of `log`."""


def package_of(kind: type) -> str:
    """The package that a class of a module is of: `lightning.pytorch`, or its twin, whose classes are others."""
    names = [one.__module__.partition(".")[0] for one in kind.__mro__]
    return "pytorch_lightning" if "pytorch_lightning" in names else "lightning.pytorch"


def is_module(found: Any) -> bool:
    """Whether an object is a LightningModule of either package."""
    return "LightningModule" in lightning_bases(type(found))


def trainer_class(module: Any) -> Any:
    """The class of the trainers that take a module: that of its own package."""
    return importlib.import_module(package_of(type(module))).Trainer


def begin_epoch_anew(trainer: Trainer) -> None:
    """Let the training loader draw the order of the epoch that begins, in the hook `on_train_epoch_start`.

    The trainer does so itself after this hook, but not in the first epoch that it trains after a checkpoint of a run's
    end: then it keeps the iterator that it made before. No public name makes another one.
    """
    loop = trainer.fit_loop
    does_itself = not getattr(loop, "is_resuming", False) and not loop.epoch_loop.restarting
    if trainer.current_epoch == 0 or not does_itself:
        iter(loop._data_fetcher)  # type: ignore[arg-type]


def sync_module_states(module: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers, as Lightning's DDP does where it wraps the module."""
    _sync_module_states(module)


def rank_processes(trainer: Trainer) -> list[subprocess.Popen[Any]] | None:
    """The processes that this one started, one for each other rank; None where something else starts them."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else None


def kill_ranks(trainer: Trainer) -> None:
    """End the processes of `rank_processes`, as Lightning does when it finds that one has failed."""
    launcher = trainer.strategy.launcher
    assert isinstance(launcher, _SubprocessScriptLauncher)
    launcher.kill(_get_sigkill_signal())


def move_to_end(trainer: Trainer, callback: Callback) -> None:
    """Let a callback come last, in its hook `setup`. The list is replaced, as Lightning iterates over it meanwhile."""
    trainer.callbacks = [*(one for one in trainer.callbacks if one is not callback), callback]  # type: ignore[attr-defined]


def end_after_exception(trainer: Trainer, exception: BaseException) -> None:
    """What the trainer does after the callbacks' hook `on_exception`, for a callback that replaces the error.

    Call it in that hook of the last callback. An error that is raised there would leave out the hooks that follow, the
    loggers' end, and the strategy's teardown, which frees the device.
    """
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        trainer.datamodule.on_exception(exception)  # type: ignore[attr-defined]
    trainer.strategy.on_exception(exception)
    for logger in trainer.loggers:
        logger.finalize("failed")
    trainer._teardown()
    trainer.state.stage = None


def average_parameters_alone(callback: WeightAveraging) -> None:
    """Let an average of weights leave out buffers, which are the default of a private attribute.

    A moving average of whole numbers is rounded down: after a few steps position 3 of an encoder is position 2.
    Encoders have no buffers that training changes.
    """
    callback._use_buffers = False


# ---------------------------------------------------------------------- what an audit observes


def observe_batches(trainer: Trainer, see: Callable[[Any], None]) -> Callable[[], None]:
    """Call `see` with each training batch as the loader returned it, before it is copied to the device.

    Callbacks get a batch only after the copy, and the hooks before it belong to the module and the data module.

    Returns:
        A function that ends it.
    """
    move = trainer.strategy.batch_to_device

    def observed(batch: Any, *args: Any, **options: Any) -> Any:
        if trainer.training:
            see(batch)
        return move(batch, *args, **options)

    trainer.strategy.batch_to_device = observed  # type: ignore[method-assign]
    return lambda: vars(trainer.strategy).pop("batch_to_device", None)


def remove_callbacks(trainer: Trainer, kinds: tuple[type, ...]) -> None:
    """Remove callbacks of some kinds, in the hook `setup` of another callback.

    Those that a module adds in `configure_callbacks` are there only when the trainer has begun, and no argument leaves
    them out. The list is replaced, not changed, as Lightning iterates over it meanwhile.
    """
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, kinds)]  # type: ignore[attr-defined]


@contextmanager
def count_fits() -> Iterator[Callable[[], int]]:
    """Count the calls of `Trainer.fit` meanwhile, of all trainers of this process.

    An objective of somebody else creates its trainers itself, so that no callback can be given to them.

    Yields:
        A function that returns the number of calls so far.
    """
    total = 0

    def counting(fit: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal total
            total += 1
            return fit(*args, **options)

        return counted

    before = [(trainer, trainer.fit) for trainer in _trainer_classes()]
    for trainer, fit in before:
        trainer.fit = counting(fit)
    try:
        yield lambda: total
    finally:
        for trainer, fit in before:
            trainer.fit = fit


def _trainer_classes() -> list[Any]:
    """Lightning's class, and that of the package `pytorch_lightning`, where it is installed."""
    return [importlib.import_module(name).Trainer for name in PACKAGES if importlib.util.find_spec(name) is not None]


def estimated_steps(trainer: Trainer) -> float:
    """`trainer.estimated_stepping_batches`, without keeping the training loader that the trainer makes for the answer.

    The trainer makes it before it restores the loader's state, and would keep it: a run resumed in the middle of an
    epoch would begin the epoch anew. Without it, the trainer makes another one in time. No public name drops it.
    """
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = None
    return steps
