"""Throughput: rates, the wait for data, counting, several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_bge.callbacks.throughput import monitor as throughput_module
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.types import Batch
from tests.helpers.plain_module import PARAMETERS, SIZES, TOKENS, Plain, dict_batches, train
from tests.helpers.rank_processes import run_ranks
from tests.helpers.small_models import Loader, cut_batch, quiet_trainer, random_sequences


class Clock:
    """Goes on by itself only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: self.now)


class Slow(Plain):
    """2 s a training batch, 50 s a validation batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 50


class Logged(Callback):
    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.note(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.note(trainer)

    def note(self, trainer: Trainer) -> None:
        names = ("train_sequences_per_s", "train_tokens_per_s")
        if names[0] in trainer.callback_metrics:
            self.rates.append(tuple(float(trainer.callback_metrics[name]) for name in names))


RATES = pytest.approx((10 / 6, TOKENS / 6))


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}, {"limit_val_batches": 0}], ids=str)
def test_rates_are_those_of_training_alone(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    clock, logged = Clock(monkeypatch), Logged()
    train(Slow(clock), Throughput(), logged, max_epochs=2, **options)
    assert logged.rates == [RATES, RATES]


def test_one_callback_may_serve_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logged, throughput = Clock(monkeypatch), Logged(), Throughput()

    class Broken(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(Broken(clock), throughput, logged)
    clock.now += 1000
    train(Slow(clock), throughput, logged)
    assert logged.rates == [RATES]


class SlowLoader(Loader):
    """Takes 1 s for a batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(dict_batches())
        self.clock = clock

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.clock.now += 1
            yield batch


class Unsized:
    """Of unknown length, so that Lightning fetches one batch ahead."""

    def __init__(self, clock: Clock) -> None:
        self.loader = SlowLoader(clock)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Waits(Logged):
    def note(self, trainer: Trainer) -> None:
        if "train_data_wait" in trainer.callback_metrics:
            self.rates.append(float(trainer.callback_metrics["train_data_wait"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "share"),
    [
        # 3 batches of 2 s, and 1 s before the second and the third
        (SlowLoader, {}, 2 / 8),
        (SlowLoader, {"limit_val_batches": 0}, 2 / 8),
        # validation after each batch stops the clock
        (SlowLoader, {"val_check_interval": 1}, 0),
        # the first two are fetched before the clock starts
        (Unsized, {}, 1 / 7),
        (Unsized, {"val_check_interval": 2}, 1 / 7),
    ],
)
def test_share_of_time_spent_waiting_for_data(
    monkeypatch: pytest.MonkeyPatch, kind: Any, options: dict[str, Any], share: float
) -> None:
    clock, waits = Clock(monkeypatch), Waits()
    trainer = quiet_trainer(callbacks=[Throughput(), waits], max_epochs=2, **options)
    trainer.fit(Slow(clock), kind(clock), Loader(dict_batches()))
    assert waits.rates == [pytest.approx(share)] * 2


def test_other_callbacks_between_batches_count_as_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(monkeypatch), Waits()

    class Busy(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 2

    train(Slow(clock), Throughput(), Busy(), waits)
    assert waits.rates == [pytest.approx(4 / 12)]  # after the last batch nothing is waited for


class Resumable(Loader):
    """Goes on after the batches that were handed out before."""

    served = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches[self.served :]:
            self.served += 1
            yield batch
        self.served = 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


def test_rates_of_a_resumed_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning does not call `on_train_epoch_start` where it goes on within an epoch."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step{trainer.global_step}.ckpt")

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "validated.ckpt")

    clock = Clock(monkeypatch)
    quiet_trainer(callbacks=[Save()]).fit(Slow(clock), Resumable(dict_batches()), Loader(dict_batches()))
    for name, expected in (("step1", [pytest.approx((6 / 4, (TOKENS - 15) / 4))]), ("validated", [])):
        logged = Logged()
        trainer = quiet_trainer(callbacks=[Throughput(), logged])
        loaders = Resumable(dict_batches()), Loader(dict_batches())
        trainer.fit(Slow(clock), *loaders, ckpt_path=tmp_path / f"{name}.ckpt", weights_only=True)
        assert logged.rates == expected, name


def test_counts_our_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cut_batch(random_sequences((9, 4, 2)), torch.zeros(3), 2)
    assert throughput_module.count_sequences_and_tokens(batch) == (3, 15)


def test_counting_a_mask_does_not_read_it() -> None:
    mask = torch.ones(3, 5, device="meta")  # to read a meta tensor is an error, as to wait for a device would be slow
    sequences, tokens = throughput_module.count_sequences_and_tokens({"attention_mask": mask})
    assert sequences == 3
    assert isinstance(tokens, Tensor)


@pytest.mark.parametrize("batch", [torch.ones(2, 6), [torch.ones(2, 6)], ({"ids": torch.ones(2, 6)}, torch.ones(2))])
def test_other_batches_have_rows_and_no_tokens(batch: Any) -> None:
    assert throughput_module.count_sequences_and_tokens(batch) == (2, 0)


@pytest.mark.parametrize("batch", ["text", None, [torch.tensor(1.0)]])
def test_batches_without_rows_need_a_count(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"got \w+ without any: pass count=lambda batch: \(sequences, tokens\)"):
        throughput_module.count_sequences_and_tokens(batch)


def test_batches_of_tensors_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.ones(size, 6) for size in SIZES]
    trainer = train(Plain(), Throughput(), batches=batches)
    assert "train_sequences_per_s" in trainer.callback_metrics
    assert not {"train_tokens_per_s", "train_utilisation", "train_padding"} & trainer.callback_metrics.keys()
    clock, logged = Clock(monkeypatch), Logged()
    train(Slow(clock), Throughput(count=lambda batch: (len(batch), batch.numel())), logged, batches=batches)
    assert logged.rates == [pytest.approx((10 / 6, 60 / 6))]


def own_shards(rank: int) -> list[Batch]:
    """Rank 0 has 3 sequences and then 1, rank 1 has 1 and then none."""
    shards, of_all = [[(5, 4, 3), (5,)], [(5,), ()]], ((12, 5), (5, 0))
    batches = [
        cut_batch(random_sequences(lengths), torch.zeros(len(lengths)), 1) for lengths in shards[rank] if lengths
    ]
    batches += [Batch(())] * (2 - len(batches))
    return [replace(batch, shard_tokens=tokens) for batch, tokens in zip(batches, of_all, strict=True)]


def on_two_ranks(balanced: bool) -> dict[str, float]:
    """Plain DDP; rank 0 needs 2 s a batch, rank 1 needs 4."""
    now = [100.0]
    throughput_module.time.perf_counter = lambda: now[0]  # type: ignore[assignment]
    throughput_module.matmul_peak = lambda *_: 1e4  # type: ignore[assignment]

    class Paced(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            now[0] += 2 * (self.global_rank + 1)
            return super().training_step(torch.ones(1, 6), batch_idx)

    class Later(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            now[0] += 1

    trainer = quiet_trainer(callbacks=[Throughput(), Later()], devices=2, strategy="ddp", limit_val_batches=0)
    batches = own_shards(trainer.global_rank)
    if not balanced:
        batches = [replace(batch, shard_tokens=()) for batch in batches]
    trainer.fit(Paced(), Loader(batches), Loader(batches))
    assert dist.get_world_size() == 2
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_figures_of_several_ranks_are_of_all_of_them() -> None:
    for balanced in (True, False):
        first, second = run_ranks(on_two_ranks, balanced)
        assert first == second
        seconds = (2 + 1 + 2 + 1, 4 + 1 + 4 + 1)
        expected = {
            "train_sequences_per_s": 4 / seconds[0] + 1 / seconds[1],
            "train_tokens_per_s": 17 / seconds[0] + 5 / seconds[1],
            "train_utilisation": 6 * PARAMETERS * (17 / seconds[0] + 5 / seconds[1]) / 2 / 1e4,
            "train_data_wait": (1 / seconds[0] + 1 / seconds[1]) / 2,
        }
        if balanced:
            expected["train_balance"] = (8.5 / 12 + 2.5 / 5) / 2
        assert first == pytest.approx(expected)
