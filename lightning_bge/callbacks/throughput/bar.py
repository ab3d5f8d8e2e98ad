"""Lightning's progress bar with the pace of training in it."""

import sys
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

from lightning_bge.callbacks.throughput.flops import Work
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.errors import ConfigError

STRETCH_S = 1.0  # figures of shorter stretches change too fast to be read


class ThroughputProgressBar(TQDMProgressBar):
    """Shows real tokens per second, utilisation and padding of the last second or more beside Lightning's own figures.

    They come from a `Throughput` in the same trainer, and mean what it logs: `tok/s`, of all ranks as if each did what
    this one does; `util`; and `pad`. The host's clock is read and no device waited for: on a GPU work that is queued up
    counts as done, which evens out over a few seconds. Tokens that were counted on a GPU, as those of a mapping with an
    `attention_mask`, are not read, so that such runs have these figures in their logs alone.

    The value that checkpoints are chosen by stands there too, after the first validation. What the root logger prints
    while a bar is drawn stands above it. Where the output is no terminal but a file, each epoch gets one line in place
    of a bar. All else is `TQDMProgressBar`'s, its arguments, `enable`, `disable` and TQDM_MINITERS included.

    Args:
        refresh_rate: batches between two refreshes; 0: no bar and no lines.
        process_position: of the bar, where several stand below each other.
        leave: leave each epoch's bar where it is.

    Raises:
        ConfigError: at the start of a run of `pytorch_lightning`'s Trainer, which would draw its own bar beside it.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._logging = ExitStack()
        self._begin()

    def _begin(self) -> None:
        self._mark = Work()
        self._pace: dict[str, str] = {}
        self._judged: dict[str, float] = {}
        self._ended: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check whose trainer it is."""
        if type(trainer).__module__.startswith("pytorch_lightning."):
            raise ConfigError(
                "ThroughputProgressBar: expected a Trainer of lightning.pytorch, got one of pytorch_lightning, which "
                "takes its own progress bars alone; import lightning.pytorch, or leave the bar out"
            )
        super().setup(trainer, pl_module, stage)

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn: in a file each refresh would be a line more."""
        return super().is_enabled and sys.stdout.isatty()

    @property
    def _writes_lines(self) -> bool:
        return super().is_enabled and not self.is_enabled

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's figures without the logger's version, the value that checkpoints are chosen by, and the pace."""
        figures = super().get_metrics(trainer, pl_module)
        figures.pop("v_num", None)
        if self.is_enabled:
            self._look(trainer, STRETCH_S)
        return {**figures, **self._judged, **self._pace}

    def _look(self, trainer: Trainer, least: float) -> None:
        """Take new figures of the pace where more than so many seconds of training have gone by."""
        source = next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)  # type: ignore[attr-defined]
        done = None if source is None else source.so_far().on_host()
        if source is None or done is None:
            return
        stretch = done - self._mark
        if stretch.seconds > least:
            self._mark, self._pace = done, _show(stretch, source, trainer.world_size)

    def on_train_start(self, *args: Any) -> None:
        """Start with no figures."""
        super().on_train_start(*args)
        self._begin()
        if self.is_enabled:
            self._logging.enter_context(logging_redirect_tqdm())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the value that checkpoints are chosen by."""
        monitor = getattr(trainer.checkpoint_callback, "monitor", None)
        if monitor in trainer.callback_metrics and not trainer.sanity_checking:
            self._judged = {monitor: float(trainer.callback_metrics[monitor])}
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that an epoch has ended; what its module logs now can be shown only later."""
        super().on_train_epoch_end(trainer, pl_module)
        self._ended = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Show the figures of the epoch before."""
        self._close_epoch(trainer, *args)
        super().on_train_epoch_start(trainer, *args)

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        """Show the figures of the last epoch."""
        self._close_epoch(trainer, *args)
        super().on_train_end(trainer, *args)
        self._logging.close()

    def on_exception(self, *args: Any) -> None:
        """Give the loggers back: after an exception Lightning does not call `on_train_end`."""
        super().on_exception(*args)
        self._logging.close()

    def _close_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        ended, self._ended = self._ended, None
        if ended is None:
            return
        if self._writes_lines:
            self._look(trainer, 0.0)
            figures = self.get_metrics(trainer, module).items()
            text = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures
            )
            self.print(f"epoch {ended}: {text}")
        elif not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, module))

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar, or plainly where there is none."""
        if self._writes_lines:
            print(*args, sep=sep, flush=True, **kwargs)
        else:
            super().print(*args, sep=sep, **kwargs)


def _show(stretch: Work, source: Throughput, ranks: int) -> dict[str, str]:
    if not stretch.has_tokens:
        return {"seq/s": f"{stretch.sequences * ranks / stretch.seconds:,.0f}"}
    figures = {
        "tok/s": f"{stretch.tokens * ranks / stretch.seconds:,.0f}",
        "util": f"{source.flops.total(stretch) / stretch.seconds / source.peak:.2f}",
    }
    return figures if stretch.padding is None else {**figures, "pad": f"{stretch.padding:.2f}"}
