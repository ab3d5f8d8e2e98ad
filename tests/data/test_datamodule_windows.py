"""A data module with windows: rows are never split, whatever cuts batches, shards and micro-batches."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tokens.cache import concatenate_tokens, tokenize_cached
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.tokenization import WindowConfig
from lightning_bge.types import Batch, MicroBatch, Schema
from tests.helpers.plain_windows import plain_types, plain_windows
from tests.helpers.small_texts import build_tokenizer, random_texts

LENGTH, STRIDE = 12, 2
TEXTS = [row[0] for row in random_texts(60, seed=5, longest=40, columns=1)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    lines = [f"{text},{'yes' if row % 3 else 'no'},g{row // 4}" for row, text in enumerate(TEXTS)]
    path.write_text("\n".join(["text,label,group", *lines]) + "\n")
    return str(path)


@pytest.fixture
def options(file: str, tokenizer_dir: str, tmp_path: Path) -> dict[str, Any]:
    return {
        **{"tokenizer": tokenizer_dir, "train_file": file, "text_columns": "text", "group_column": "group"},
        **{"max_length": LENGTH, "batch_size": 7, "cache_dir": str(tmp_path / "cache")},
        **{"batching": {"max_tokens": 50, "eval_max_tokens": 50}, "windows": {"stride": STRIDE}},
    }


def rows_of(batches: Any) -> list[int]:
    return [row for batch in batches for micro in batch.micro for row in micro.rows.tolist()]


def check(micro: MicroBatch, labels: np.ndarray) -> None:
    """A micro-batch against windows cut by hand."""
    tokenizer = build_tokenizer()
    expected = [plain_windows(tokenizer, (TEXTS[row],), LENGTH, STRIDE) for row in micro.rows.tolist()]
    assert micro.windows == tuple(len(windows) for windows in expected)
    flat = [window for windows in expected for window in windows]
    assert micro.lengths == tuple(map(len, flat))
    assert micro.row_lengths == tuple(sum(map(len, windows)) for windows in expected)
    assert list(micro.row_lengths) == sorted(micro.row_lengths, reverse=True)
    assert [part.tolist() for part in micro.input_ids.split(micro.lengths)] == flat
    assert micro.positions.tolist() == [place for window in flat for place in range(len(window))]
    assert micro.cu_seqlens.tolist() == [0, *np.cumsum([len(window) for window in flat])]
    assert micro.cu_seqlens.dtype == torch.int32
    assert micro.token_type_ids is not None
    assert micro.token_type_ids.tolist() == [kind for window in flat for kind in plain_types(window, 3, False)]
    assert micro.labels is not None
    assert micro.labels.tolist() == labels[micro.rows.numpy()].tolist()
    assert micro.groups is not None
    assert len(micro.groups) == len(micro.rows)
    assert sum(micro.lengths) <= 50 or len(micro.rows) == 1


def test_micro_batches_hold_whole_rows(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    data.setup("fit")
    assert data.train_labels is not None
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.size == sum(len(micro.rows) for micro in batch.micro)
            for micro in batch.micro:
                check(micro, data.train_labels)
                seen.append(len(micro.rows) > 1 and len(micro.lengths) > len(micro.rows))
    assert any(seen)
    totals = [sum(map(len, plain_windows(build_tokenizer(), (text,), LENGTH, STRIDE))) for text in TEXTS]
    assert data.lengths("train").tolist() == totals
    assert max(totals) > 50  # such a row is a micro-batch of its own


def test_shards_and_evaluation_give_each_row_to_one_rank(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    data.setup("fit")
    alone = [list(loader) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert data.train_labels is not None
    shards = []
    for rank in range(2):
        state = SimpleNamespace(fn=TrainerFn.FITTING)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, state=state, overfit_batches=0)
        shards.append([list(loader) for loader in (data.train_dataloader(), data.val_dataloader())])
    for step, batch in enumerate(alone[0]):
        parts: list[Batch] = [own[0][step] for own in shards]
        assert sorted(rows_of(parts)) == sorted(rows_of([batch]))
        assert {part.shard_tokens for part in parts} == {tuple(part.tokens for part in parts)}
        for micro in (micro for part in parts for micro in part.micro):
            check(micro, data.train_labels)
    assert sorted(rows_of(shards[0][1] + shards[1][1])) == sorted(rows_of(alone[1]))


def test_the_size_of_a_micro_batch_goes_by_the_longest_row(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    data.setup("fit")
    longest = int(data.lengths("train").max())
    step = data.micro_batch_size_step
    assert step % LENGTH == 0
    assert longest <= step < longest + LENGTH
    for size, train in ((step, True), (3 * step, True), (step, False)):
        [micro] = data.worst_case_batch(size, train).micro
        assert set(micro.lengths) == {LENGTH}
        assert sum(micro.lengths) == (size if train else max(step, 50 // LENGTH * LENGTH))
    without = TextDataModule(**{**options, "windows": {}})
    without.setup("fit")
    assert without.micro_batch_size_step == LENGTH


def test_rows_that_fit_make_the_batches_of_before(options: dict[str, Any]) -> None:
    found = []
    for windows in ({}, {"stride": STRIDE}):
        data = TextDataModule(**{**options, "max_length": 64, "windows": windows})
        data.setup("fit")
        found.append([micro for batch in data.train_dataloader() for micro in batch.micro])
    for plain, windowed in zip(*found, strict=True):
        assert windowed.windows == (1,) * len(plain.rows)
        assert plain.windows is None
        for name in ("input_ids", "positions", "cu_seqlens", "rows", "labels", "groups", "token_type_ids"):
            assert torch.equal(getattr(plain, name), getattr(windowed, name)), name
        assert plain.lengths == windowed.lengths


def test_the_cache_keeps_windows_apart_and_maps_them_in_other_processes(tokenizer: Any, tmp_path: Path) -> None:
    texts = [(text,) for text in TEXTS]
    kinds = [WindowConfig(), WindowConfig(2), WindowConfig(3), WindowConfig(2, max_windows=2)]
    found = [tokenize_cached(texts, tokenizer, LENGTH, tmp_path, windows) for windows in kinds]
    assert len({tokens.path for tokens in found}) == 4
    assert tokenize_cached(texts, tokenizer, LENGTH, tmp_path, WindowConfig(2, "max")).path == found[1].path
    assert found[0].window_offsets is None
    tokens = found[1]
    again = pickle.loads(pickle.dumps(tokens))
    parts = [tokenize_cached(part, tokenizer, LENGTH, tmp_path, kinds[1]) for part in (texts[:20], texts[20:])]
    for other in (again, concatenate_tokens(*parts)):
        for name in ("input_ids", "offsets", "lengths", "token_type_ids", "window_offsets", "window_lengths"):
            assert np.array_equal(getattr(other, name), getattr(tokens, name)), name


def test_an_exported_model_brings_its_windows(options: dict[str, Any], tmp_path: Path) -> None:
    folder, windows = tmp_path / "export", WindowConfig(STRIDE, "max", 3)
    build_tokenizer().save_pretrained(folder)
    Schema("binary", ("no", "yes"), ("text",), LENGTH, windows=windows).save(folder)
    file = options["train_file"]
    given = {**options, "tokenizer": str(folder), "predict_file": file, "test_file": file, "max_length": 512}
    del given["windows"]
    for stage in ("predict", "test", "validate"):
        data = TextDataModule(**{**given, "max_length": LENGTH})
        data.setup(stage)
        assert data.schema is not None
        assert data.schema.windows == windows
        loader = {"predict": data.predict_dataloader, "test": data.test_dataloader, "validate": data.val_dataloader}
        for micro in (micro for batch in loader[stage]() for micro in batch.micro):
            assert micro.pooling == "max"
            assert micro.windows is not None
            assert max(micro.windows) <= 3
    own = TextDataModule(**given, windows={"stride": 4})
    own.setup("predict")
    assert own.schema is not None
    assert own.schema.windows == WindowConfig(4, "max", 3)  # the option that is set, in place of the model's
    trained = TextDataModule(**given)  # a new training goes by its own options, as for max_length
    trained.setup("fit")
    assert trained.schema is not None
    assert trained.schema.windows == WindowConfig()


def test_wrong_options_and_rows_without_room_end_the_setup(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.windows.stride must be at most 9, .*12 tokens .*; got 10"):
        TextDataModule(**{**options, "windows": {"stride": 10}}).setup("fit")
    with pytest.raises(ConfigError, match="windows has no key step; its keys are stride, pooling, max_windows"):
        TextDataModule(**{**options, "windows": {"step": 10}})
    path = tmp_path / "pairs.jsonl"
    long = " ".join(["w1"] * 9)
    path.write_text('{"a": "w1", "b": "w2", "label": 0}\n' + f'{{"a": "{long}", "b": "{long}", "label": 1}}\n')
    pairs = {**options, "train_file": str(path), "text_columns": ("a", "b"), "group_column": None}
    with pytest.raises(DataError, match=r"row 2: the first text has 9 tokens\. .*room for 6"):
        TextDataModule(**pairs).setup("fit")
    fits = tmp_path / "fits.jsonl"
    fits.write_text("".join(f'{{"a": "w{row}", "b": "w2", "label": {row % 2}}}\n' for row in range(20)))
    data = TextDataModule(**{**pairs, "train_file": str(fits), "test_file": str(path)})
    data.setup("fit")
    with pytest.raises(DataError, match=r"pairs.jsonl: data row 2: the first text has 9 tokens\."):
        data.test_hash()  # before training, and not after it


def test_hparams_make_an_equal_data_module(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    assert data.hparams["windows"] == {"stride": STRIDE, "pooling": "mean", "max_windows": None}
    assert TextDataModule(**data.hparams).windows == data.windows
