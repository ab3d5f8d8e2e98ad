"""The callbacks that a user names under `trainer.callbacks`, checked before a run of `fit` begins."""

from collections.abc import Sequence

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_bge.cli.arguments import nearest
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.callback_kinds import Given, callback_list, check_usable, is_kind

KNOWN = ("lightning", "pytorch_lightning", "lightning_bge")  # packages whose callbacks log nothing by unknown names


def check_callbacks(callbacks: Given, logged: Sequence[str]) -> None:
    """Refuse callbacks that can't work with this program's module, and those that monitor what is never logged.

    Args:
        callbacks: those of the options.
        logged: what the module logs in training. Where a callback is neither Lightning's nor this program's, it may log
            more, and names are not checked.

    Raises:
        ConfigError: there is such a callback; the message names it and the remedy.
    """
    given = callback_list(callbacks)
    check_usable(given)
    if any(type(callback).__module__.partition(".")[0] not in KNOWN for callback in given):
        return
    for callback in given:
        monitors = is_kind(type(callback), (EarlyStopping, ModelCheckpoint))
        monitored = getattr(callback, "monitor", None) if monitors else None
        # `Throughput` logs names with `train_` as well, which depend on the machine
        if monitored is not None and monitored not in logged and not monitored.startswith("train_"):
            near = nearest(monitored, logged, cutoff=0.4)
            hint = "" if near is None else f" (did you mean {near}?)"
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__}.monitor is {monitored}, which is not logged{hint}. "
                f"Expected one of {', '.join(logged)}"
            )
