"""The progress bar on a made-up clock and terminal, and the figures that `Throughput` logs beside it."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn

from lightning_bge.callbacks.throughput import monitor as throughput_module
from lightning_bge.callbacks.throughput.bar import ThroughputProgressBar
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.trainer import BGETrainer
from lightning_bge.types import Schema
from tests.helpers.small_models import Batches, Loader, cut_batch, quiet_trainer, random_sequences, save_model

PEAK = 1e4
BATCHES = 4


class Terminal(io.StringIO):
    def __init__(self, terminal: bool = True) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, which goes on where a test says so; and a peak that is known."""
    time = [100.0]
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: time[0])
    monkeypatch.setattr(throughput_module, "matmul_peak", lambda *_: PEAK)
    return time


class Slow(LightningModule):
    """So many seconds a training batch; 100 a validation batch."""

    def __init__(self, now: list[float], seconds: float) -> None:
        super().__init__()
        self.layer, self.now, self.seconds = nn.Linear(6, 1), now, seconds

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.now[0] += self.seconds
        loss = self.layer(batch["input_ids"]).mean()
        self.log("loss", float(self.current_epoch), on_step=False, on_epoch=True, prog_bar=True, batch_size=4)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.now[0] += 100
        self.log("val_f1", 0.25 + self.current_epoch / 2, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def masked(sizes: tuple[int, ...] = (4,) * BATCHES) -> Loader:
    """Batches of sequences of 3 real tokens in 6."""
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    return Loader([{"input_ids": torch.ones(size, 6), "attention_mask": mask.repeat(size, 1)} for size in sizes])


class Shown(Callback):
    """What the bar shows after each batch, and the terminal that it is drawn on."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.figures: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        text = getattr(trainer.progress_bar_callback.train_progress_bar, "postfix", None) or ""
        self.figures.append(dict(part.split("=") for part in text.split(", ") if part))


def shown(module: LightningModule, *callbacks: Callback, terminal: Terminal | None = None, **options: Any) -> Shown:
    seen = Shown(terminal or Terminal())
    bars = [callback for callback in callbacks if isinstance(callback, TQDMProgressBar)] or [ThroughputProgressBar()]
    others = [callback for callback in callbacks if callback not in bars]
    options = {"callbacks": [*others, *bars, seen], "enable_progress_bar": True, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", seen.terminal)
        quiet_trainer(**options).fit(module, masked(), Loader([{}]))
    return seen


def test_figures_of_the_last_stretch(now: list[float]) -> None:
    class Faster(Slow):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seconds = 2.0 if batch_idx < 2 else 4.0

    seen = shown(Faster(now, 2.0), Throughput())
    # 12 real tokens a batch of 24; 6 x 7 FLOPs each
    slow, fast = ({"tok/s": f"{12 / s:.0f}", "util": f"{6 * 7 * 12 / s / PEAK:.2f}", "pad": "0.50"} for s in (4.0, 2.0))
    assert seen.figures == [fast, fast, slow, slow]


def test_stretches_of_less_than_a_second_are_put_together(now: list[float]) -> None:
    seen = shown(Slow(now, 0.4), Throughput())
    assert [figures.get("tok/s") for figures in seen.figures] == [None, None, "30", "30"]


def test_validation_is_left_out_and_its_judgement_shown(now: list[float], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_f1")
    seen = shown(Slow(now, 2.0), Throughput(), keep, max_epochs=2, enable_checkpointing=True)
    assert [figures["tok/s"] for figures in seen.figures] == ["6"] * 2 * BATCHES
    assert ["val_f1" in figures for figures in seen.figures] == [False] * BATCHES + [True] * BATCHES
    assert float(seen.figures[-1]["val_f1"]) == 0.25


def test_the_last_epoch_s_figures_are_shown_at_the_end(now: list[float]) -> None:
    seen = shown(Slow(now, 2.0), Throughput(), max_epochs=2)
    last = seen.terminal.getvalue().split("\r")[-1]
    assert "Epoch 1: 100%" in last
    assert "loss=1.000" in last


def test_tokens_on_a_device_are_not_read(now: list[float]) -> None:
    def on_a_device(batch: Any) -> tuple[int, Tensor]:
        return 4, torch.ones((), device="meta")

    class NotLogged(Throughput):
        def on_train_epoch_end(self, *_: Any) -> None:
            pass

    seen = shown(Slow(now, 2.0), NotLogged(on_a_device))
    assert not any("tok/s" in figures for figures in seen.figures)


def test_without_throughput_it_is_lightning_s_bar(now: list[float]) -> None:
    assert shown(Slow(now, 2.0)).figures == [{}] * BATCHES


def test_lightning_s_switches(now: list[float]) -> None:
    seen = shown(Slow(now, 2.0), Throughput(), ThroughputProgressBar(refresh_rate=2))
    assert [bool(figures) for figures in seen.figures] == [False, True, True, True]

    class Off(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.progress_bar_callback.disable()

    for options in ((ThroughputProgressBar(refresh_rate=0),), (Off(),)):
        assert shown(Slow(now, 2.0), Throughput(), *options).terminal.getvalue() == ""


def test_messages_stand_above_the_bar(now: list[float]) -> None:
    class Talks(Slow):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            logging.getLogger("some.library").warning("batch %d", batch_idx)
            if batch_idx == 3:
                raise RuntimeError("it breaks")

    terminal = Terminal()
    root, written_to = logging.getLogger(), logging.StreamHandler(terminal)
    root.addHandler(written_to)
    before = root.handlers[:]
    try:
        with pytest.raises(RuntimeError, match="it breaks"):
            shown(Talks(now, 2.0), Throughput(), terminal=terminal)
        assert root.handlers == before
    finally:
        root.removeHandler(written_to)
    for number in (1, 2, 3):  # the bar is wiped out before
        assert re.search(rf"\r *\rbatch {number}\n", terminal.getvalue())


# ------------------------------------------------------------------ where there is no terminal


def test_a_file_gets_a_line_an_epoch(now: list[float], tmp_path: Path) -> None:
    class Talks(Slow):
        def on_fit_end(self) -> None:
            self.print("done")

    keep = ModelCheckpoint(tmp_path, monitor="val_f1")
    options = {"max_epochs": 2, "enable_checkpointing": True, "terminal": Terminal(False)}
    seen = shown(Talks(now, 0.1), Throughput(), keep, **options)
    assert seen.terminal.getvalue().splitlines() == [
        "epoch 0: loss 0, val_f1 0.25, tok/s 120, util 0.50, pad 0.50",
        "epoch 1: loss 1, val_f1 0.75, tok/s 120, util 0.50, pad 0.50",
        "done",
    ]
    silent = shown(Slow(now, 0.1), ThroughputProgressBar(refresh_rate=0), terminal=Terminal(False))
    assert silent.terminal.getvalue() == ""


# ------------------------------------------------------------------ what is logged


@pytest.mark.parametrize(("attention", "computed"), [("packed", 20), ("padded", 3 * 9 + 2 * 2)])
def test_padding_and_utilisation_are_logged(now: list[float], tmp_path: Path, attention: Any, computed: int) -> None:
    class Paced(BGEClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            now[0] += 2
            super().training_step(batch, batch_idx)

    batch = cut_batch(random_sequences((9, 4, 4, 2, 1), vocabulary=45), torch.tensor([0.0, 1, 0, 1, 0]), 2)
    module = Paced(save_model(tmp_path / "model"), attention=attention)
    trainer = quiet_trainer(callbacks=[source := Throughput()])
    trainer.fit(module, datamodule=Batches(Schema("binary", ("no", "yes"), ("text",), 64), [batch, batch], [batch]))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train_padding"] == pytest.approx(1 - 20 / computed)
    assert logged["train_tokens_per_s"] == pytest.approx(10)
    outside = sum(p.numel() for name, p in module.named_parameters() if "_embeddings" not in name)
    assert source.flops.per_token == 6 * outside
    assert source.flops.per_square == 12 * 2 * 32
    flops = 6 * outside * 20 + 12 * 2 * 32 * (81 + 16 + 16 + 4 + 1)
    assert logged["train_utilisation"] == pytest.approx(flops / 2 / PEAK)


def test_a_count_of_one_s_own_leaves_padding_out(now: list[float]) -> None:
    trainer = quiet_trainer(callbacks=[Throughput(lambda batch: (len(batch["input_ids"]), 10))])
    trainer.fit(Slow(now, 2.0), masked(), Loader([{}]))
    assert "train_padding" not in trainer.callback_metrics
    assert float(trainer.callback_metrics["train_utilisation"]) == pytest.approx(6 * 7 * 10 / 2 / PEAK)


# ------------------------------------------------------------------ the program's trainer


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, ThroughputProgressBar),
        ({"enable_progress_bar": True}, ThroughputProgressBar),
        ({"callbacks": [TQDMProgressBar()]}, TQDMProgressBar),
        ({"enable_progress_bar": False}, type(None)),
    ],
    ids=["nothing said", "on", "own", "off"],
)
def test_the_program_uses_it_unless_told_otherwise(options: dict[str, Any], kind: type) -> None:
    off = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "precision": "32-true"}
    assert type(BGETrainer(**{**off, **options}).progress_bar_callback) is kind
