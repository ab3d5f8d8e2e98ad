"""Out of memory in a trial, of any Lightning module: the trial is pruned, and the study goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields

import optuna
from lightning.pytorch import LightningModule, Trainer

from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.runtime.compat.lightning import end_after_exception, move_to_end
from lightning_bge.runtime.memory import live_bytes, release
from lightning_bge.runtime.oom import OutOfMemory, clean_up, find_oom

KEPT_BYTES = 2**20  # that an out-of-memory trial may leave behind: the libraries' small caches
KEPT = "memory_kept"  # user attribute: bytes that it has left behind, where they are more
OOM_ATTRIBUTES = tuple(f"oom_{field.name}" for field in fields(OutOfMemory))  # user attributes: what is known of it


class OOMPruningCallback(OOMHandler):
    """Ends a trial whose `fit` runs out of memory as pruned, in place of the error that would end the study.

    ```python
    def objective(trial):
        module = MyModule(width=trial.suggest_int("width", 64, 8192, log=True))
        trainer = Trainer(callbacks=[OOMPruningCallback(trial), ...])
        trainer.fit(module, data)
        return trainer.callback_metrics["val_loss"].item()
    ```

    Where memory runs out before `fit` runs, as in the module's constructor, and to be told of a trial that has not
    given its memory back, put the whole of the objective under `prune_out_of_memory`.

    It does what `OOMHandler` does too. Other errors are left alone.

    Args:
        trial: the running trial. It gets the user attributes `oom_where`, `oom_kind`, `oom_requested` and `oom_free`
            (bytes, or None where they are not known), and `oom_text`.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        super().__init__()
        self.trial = trial

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come after all other callbacks: they are told of the error before this one replaces it."""
        move_to_end(trainer, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note an out-of-memory error, and raise `optuna.TrialPruned` in its place."""
        super().on_exception(trainer, pl_module, exception)
        for record in self.records:
            note(self.trial, record)
            end_after_exception(trainer, exception)
            raise optuna.TrialPruned(str(record)) from None


@contextmanager
def prune_out_of_memory(trial: optuna.Trial, shared: Callable[[], int] = int) -> Iterator[None]:
    """Run a trial; an out-of-memory error in it ends it as pruned, after what it has taken was given back.

    ```python
    def objective(trial):
        with prune_out_of_memory(trial):
            ...
    ```

    While an error is handled, its traceback keeps the tensors of the failed step alive, so that only here, outside of
    `fit`, can be checked whether the memory is back. What is still held after a failed trial would make later ones fail
    that fit: the user attribute `memory_kept` says how many bytes it is, where it is more than 1 MiB.

    Args:
        trial: the running trial. It gets the user attributes of `OOMPruningCallback`.
        shared: bytes of tensors that trials share, which do not count.

    Raises:
        optuna.TrialPruned: memory ran out.
    """
    release(host=False)  # the garbage of what ran before is not this trial's baseline
    before, reason = live_bytes() - shared(), ""
    try:
        yield
    except Exception as error:
        failed = find_oom(error)
        if failed is None:
            raise
        note(trial, failed)
        clean_up(error)
        reason = str(failed)
    if reason:  # outside of the handler, where nothing refers to the error any more
        kept = live_bytes() - shared() - before
        if kept > KEPT_BYTES:
            trial.set_user_attr(KEPT, kept)
        raise optuna.TrialPruned(reason)


def note(trial: optuna.Trial, record: OutOfMemory) -> None:
    """Write what is known of an out-of-memory error into the trial's user attributes."""
    for name, value in zip(OOM_ATTRIBUTES, astuple(record), strict=True):
        trial.set_user_attr(name, value)
