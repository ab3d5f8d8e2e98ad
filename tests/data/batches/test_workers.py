"""The number of worker processes: measured with a clock that goes on only where a test says so."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bge.data.batches import max_tokens as batching
from lightning_bge.data.batches import workers as loading
from lightning_bge.data.batches.max_tokens import (
    BatchingConfig,
    BatchLoader,
    EffectiveBatchSampler,
    EncodedDataset,
    EvalSampler,
)
from lightning_bge.data.batches.workers import (
    LoaderChoice,
    choose_once,
    choose_workers,
    count_tensors,
    worker_candidates,
)
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tokens.cache import tokenize_cached
from lightning_bge.errors import ConfigError
from tests.helpers.small_texts import random_texts

START = 3.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class RawText:
    """Loaders of raw text with a slow tokeniser, `seconds` a batch; workers share the work, `fastest` is their limit.

    As torch's workers do, each has two batches ready by the time that the first one comes.
    """

    def __init__(self, seconds: float, fastest: float = 0.0, length: int = 1000, slow: tuple[int, ...] = ()) -> None:
        self.clock, self.seconds, self.fastest, self.length, self.slow = Clock(), seconds, fastest, length, slow
        self.started: list[int] = []

    def __call__(self, workers: int) -> Iterator[dict[str, Tensor]]:
        self.started.append(workers)
        for number in range(self.length):
            if workers == 0:
                self.clock.now += self.seconds * (10 if number in self.slow else 1)
            elif number == 0:
                self.clock.now += START
            elif number >= 2 * workers:
                self.clock.now += max(self.seconds / workers, self.fastest)
            yield {"input_ids": torch.ones(1), "attention_mask": torch.ones(1)}

    def choose(self, **options: Any) -> LoaderChoice:
        return choose_workers(self, **{"candidates": (1, 2, 4, 8), "clock": self.clock, **options})


def test_cheap_batches_start_no_process() -> None:
    texts = RawText(0.5e-3)
    choice = texts.choose()
    assert choice == LoaderChoice(
        0,
        "a batch is assembled in 0.5 ms at best, to take it over from a worker costs 0.58 ms or more",
        {0: pytest.approx(0.5e-3)},
    )
    assert texts.started == [0]


def test_a_slow_tokeniser_gets_workers() -> None:
    texts = RawText(0.02)
    choice = texts.choose()
    assert choice.num_workers == 8
    assert choice.measured == pytest.approx({0: 0.02, 1: 0.02, 2: 0.01, 4: 0.005, 8: 0.0025})
    assert choice.reason == (
        "a batch takes 20 ms in this process, 20 ms with 1, 10 ms with 2, 5 ms with 4, 2.5 ms with 8; "
        "starting them takes 3.0 s for each run"
    )
    assert texts.started == [0, 1, 2, 4, 8]


def test_the_fewest_that_come_near_the_best() -> None:
    assert RawText(0.02, fastest=0.0051).choose().num_workers == 4
    assert RawText(0.02, fastest=0.0096).choose().num_workers == 2
    assert RawText(0.02, fastest=0.0094).choose(candidates=(2, 4)).num_workers == 4  # 2 are 6 % behind
    assert RawText(0.02, fastest=0.03).choose().num_workers == 0  # workers that are slower than none


def test_a_known_step_takes_no_more_workers_than_it_needs() -> None:
    texts = RawText(0.02)
    choice = texts.choose(step_seconds=0.011)
    assert choice.num_workers == 2
    assert texts.started == [0, 1, 2]  # more could not make a step any shorter
    assert "a step takes 11 ms" in choice.reason
    assert RawText(0.02).choose(step_seconds=0.1).num_workers == 1  # 0.1 s with a worker, 0.12 without
    assert RawText(0.02).choose(step_seconds=0.5).num_workers == 0  # 0.5 against 0.52: within 5 %
    texts = RawText(0.02)
    assert texts.choose(step_seconds=2.5).reason == (
        "a batch is assembled in 20 ms at best, under 1% of a step of 2.5e+03 ms"
    )
    assert texts.started == [0]


def test_a_busy_machine_starts_no_process() -> None:
    texts = RawText(0.5e-3, slow=tuple(range(15)))
    choice = texts.choose()
    assert texts.started == [0]
    assert choice.measured == {0: pytest.approx(5e-3)}


def test_loaders_that_end_early() -> None:
    assert RawText(0.02, length=0).choose() == LoaderChoice(0, "the loader gives too few batches to be timed", {})
    assert RawText(0.02, length=1).choose().num_workers == 0
    choice = RawText(0.02, length=6).choose()
    assert choice.measured == pytest.approx({0: 0.02, 1: 0.02, 2: 0.01})
    assert choice.num_workers == 2
    choice = RawText(0.02, length=3).choose()
    assert choice.num_workers == 0
    assert choice.reason == "a batch takes 20 ms in this process, no worker could be timed"


@pytest.mark.parametrize("bad", [{"candidates": (0, 1)}, {"candidates": (-2,)}, {"batches": 0}], ids=str)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="choose_workers: expected batches and candidates from 1 up"):
        RawText(0.02).choose(**bad)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, (1,)), (2, (1,)), (3, (1,)), (4, (1, 2)), (8, (1, 2, 4, 6)), (10, (1, 2, 4, 8)), (16, (1, 2, 4, 8, 14))],
)
def test_candidates_leave_two_cores(monkeypatch: pytest.MonkeyPatch, cores: int, expected: tuple[int, ...]) -> None:
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert worker_candidates() == expected
    monkeypatch.delattr(loading.os, "sched_getaffinity")
    monkeypatch.setattr(loading.os, "cpu_count", lambda: cores)
    assert worker_candidates() == expected
    texts = RawText(0.02)
    texts.choose(candidates=None)
    assert texts.started == [0, *expected]


def test_tensors_of_a_batch() -> None:
    @dataclass(frozen=True)
    class Pair:
        left: Tensor
        right: tuple[Tensor, ...]
        name: str = "x"

    one = torch.ones(1)
    assert count_tensors({"a": one, "b": [one, (one, None)], "c": "text", "d": Pair(one, (one, one))}) == 6


class Sleepy(Dataset[Tensor]):
    """20 ms a batch, at no cost for the processor."""

    def __getitem__(self, row: int) -> Tensor:
        time.sleep(0.02)
        return torch.ones(3)

    def __len__(self) -> int:
        return 60


more_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning")


@pytest.mark.slow
@more_than_cores
def test_real_workers_are_measured_and_ended() -> None:
    def make_loader(workers: int) -> DataLoader[Tensor]:
        context = "forkserver" if workers else None
        return DataLoader(Sleepy(), 2, num_workers=workers, multiprocessing_context=context)

    choice = choose_workers(make_loader, (1, 3))
    assert choice.measured.keys() == {0, 1, 3}
    assert multiprocessing.active_children() == []


# ------------------------------------------------------------------ our own loader


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_choices", {})


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    tokens = tokenize_cached(random_texts(40, seed=3), tokenizer, 16, tmp_path_factory.mktemp("cache"))
    return EncodedDataset(tokens, np.arange(40, dtype=np.float32), None, max_tokens=60)


def loader(dataset: EncodedDataset, batch_size: int = 7, **options: Any) -> BatchLoader:
    return BatchLoader(dataset, EffectiveBatchSampler(np.arange(40), batch_size, 0), BatchingConfig(**options))


def seen(loader: BatchLoader) -> list[list[int]]:
    return [[row for micro in batch.micro for row in micro.rows.tolist()] for batch in loader]


def test_tokenised_rows_are_assembled_in_process(dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "choose_workers", functools.partial(choose_workers, clock=Clock()))
    found = loader(dataset)
    assert found.choice.num_workers == 0
    assert found.choice.measured == {0: 0.0}
    assert "to take it over from a worker" in found.choice.reason


def test_measured_once_for_a_kind_of_dataset(
    dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning_bge")
    asked: list[int] = []

    def answer(make_loader: Any, batches: int) -> LoaderChoice:
        asked.append(len(list(make_loader(0))))
        return LoaderChoice(0, "it is so", {0: 1.0})

    monkeypatch.setattr(batching, "choose_workers", answer)
    for _ in range(100):
        loader(dataset)
        BatchLoader(dataset, EvalSampler(np.arange(3, 40), dataset.tokens.lengths, 60), BatchingConfig())
    assert len(asked) == 2
    assert min(asked) >= batching.EXAMPLES + 2
    loader(dataset, batch_size=9)
    assert len(asked) == 3
    assert [record.getMessage() for record in caplog.records] == ["num_workers 0: it is so"]


def test_a_new_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning_bge")
    for key, workers in (("a", 0), ("b", 0), ("c", 2), ("c", 5)):
        choose_once(key, lambda workers=workers: LoaderChoice(workers, "why", {}))  # type: ignore[misc]
    assert [record.getMessage() for record in caplog.records] == ["num_workers 0: why", "num_workers 2: why"]


def test_the_measurement_touches_no_order_and_no_random_state(dataset: EncodedDataset) -> None:
    sampler = EffectiveBatchSampler(np.arange(40), 7, 0)
    sampler.set_epoch(3)
    sampler.skip = 2
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    BatchLoader(dataset, sampler, BatchingConfig())
    assert (sampler.epoch, sampler.skip) == (3, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]


@more_than_cores
def test_the_order_is_the_same_for_any_number(dataset: EncodedDataset) -> None:
    auto, none, two = (loader(dataset, num_workers=workers) for workers in ("auto", 0, 2))
    for epoch in range(2):
        for each in (auto, none, two):
            each.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        assert seen(auto) == seen(none) == seen(two)
    assert two.choice == LoaderChoice(2, "as data.batching.num_workers says", {})


@more_than_cores
def test_more_workers_where_they_are_chosen(dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "choose_workers", lambda *_, **__: LoaderChoice(3, "measured", {}))
    found = loader(dataset)
    assert found._loader.num_workers == 3
    assert found._loader.persistent_workers


def test_nothing_to_measure(dataset: EncodedDataset) -> None:
    for sampler in (
        EffectiveBatchSampler(np.arange(0), 7, 0),
        EvalSampler(np.arange(0), dataset.tokens.lengths, 60),
    ):
        assert list(BatchLoader(dataset, sampler, BatchingConfig())) == []


@pytest.mark.parametrize("bad", [-1, "many", 1.5, None, True])
def test_bad_numbers(bad: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"data.batching.num_workers must be auto, or 0 or more processes, got {bad!r}"
    ):
        BatchingConfig(num_workers=bad)


def test_numbers_from_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data.batching", type=BatchingConfig)

    def read(value: str) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(f"data:\n  batching:\n    num_workers: {value}\n")
        return parser.instantiate(parser.parse_args(["--config", str(path)])).data.batching.num_workers

    assert read("auto") == "auto"
    assert read("3") == 3
    with pytest.raises(ArgumentError, match="num_workers"):
        read("many")
    with pytest.raises(ConfigError, match="got -1"):
        read("-1")


def test_the_data_module_keeps_the_choice(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> None:
    data = TextDataModule(
        tokenizer_dir, train_file=str(pairs_file), text_columns=("text_a", "text_b"), cache_dir=str(tmp_path)
    )
    data.setup("fit")
    for found in (data.train_dataloader(), data.val_dataloader()):
        assert isinstance(found, BatchLoader)
        assert found.choice.num_workers == 0
