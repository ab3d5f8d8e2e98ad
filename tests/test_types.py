from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_bge.errors import ConfigError
from lightning_bge.tokenization import WindowConfig
from lightning_bge.types import TASKS, Batch, Schema, Task
from tests.helpers.small_models import cut_batch, micro_batch, random_sequences


def test_batch_counts_sequences_and_real_tokens() -> None:
    batch = cut_batch(random_sequences((9, 4, 7, 2, 2)), torch.arange(5.0), pieces=2)
    assert (batch.size, batch.tokens) == (5, 24)
    assert [micro.lengths for micro in batch.micro] == [(9, 7, 4), (2, 2)]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 2, 1, 3, 4]
    assert Batch((micro_batch(random_sequences((3,))),)).labels is None


def test_a_batch_counts_and_splits_rows_of_several_windows() -> None:
    sequences = random_sequences((8, 8, 5, 8, 3, 9, 2))
    whole = replace(
        micro_batch(sequences, torch.arange(4.0), token_types=True, groups=(0, 0, 1, 1)),
        windows=(3, 2, 1, 1),
        rows=torch.tensor([7, 1, 5, 2]),
        pooling="max",
    )
    batch = Batch((whole,))
    assert (batch.size, batch.tokens, whole.row_lengths) == (4, 43, (21, 11, 9, 2))
    parts = batch.split(20).micro
    assert [part.row_lengths for part in parts] == [(21,), (11, 9), (2,)]
    assert [part.windows for part in parts] == [(3,), (2, 1), (1,)]
    assert [part.lengths for part in parts] == [(8, 8, 5), (8, 3, 9), (2,)]
    assert [part.cu_seqlens.tolist() for part in parts] == [[0, 8, 16, 21], [0, 8, 11, 20], [0, 2]]
    assert [part.rows.tolist() for part in parts] == [[7], [1, 5], [2]]
    assert {part.pooling for part in parts} == {"max"}
    for name in ("input_ids", "positions", "token_type_ids", "labels", "groups"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert batch.split(1).size == 4
    assert batch.split(43).micro == (whole,)


def test_moving_a_batch_leaves_rows_and_groups_on_the_host() -> None:
    sequences = random_sequences((4, 3))
    batch = Batch((micro_batch(sequences, torch.ones(2), token_types=True, groups=(0, 0)),))
    [moved] = batch.to("meta").micro
    on_device = (moved.input_ids, moved.positions, moved.cu_seqlens, moved.token_type_ids, moved.labels)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in on_device)
    assert moved.rows.device.type == "cpu"
    assert moved.groups is not None
    assert moved.groups.device.type == "cpu"
    assert moved.lengths == (4, 3)
    [same] = batch.to("cpu").micro
    assert torch.equal(same.input_ids, torch.cat(sequences))
    [bare] = Batch((micro_batch(sequences),)).to("meta").micro
    assert bare.token_type_ids is None
    assert bare.labels is None


@pytest.mark.parametrize(
    ("task", "labels", "outputs"),
    [
        ("binary", ("n", "y"), 1),
        ("regression", (), 1),
        ("multiclass", ("a", "b"), 2),
        ("multilabel", ("a", "ä", "c"), 3),
    ],
)
def test_a_saved_schema_is_loaded_unchanged(tmp_path: Path, task: Task, labels: tuple[str, ...], outputs: int) -> None:
    windows = WindowConfig(8, "max", 5)
    schema = Schema(task, labels, ("text_a", "text_b"), 77, threshold=0.1 + 0.2, windows=windows)
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema
    assert schema.num_outputs == outputs
    assert task in TASKS


def test_an_older_schema_has_no_windows(tmp_path: Path) -> None:
    content = {"schema_version": 1, "task": "binary", "labels": ["0", "1"], "text_columns": ["a"], "max_length": 8}
    (tmp_path / "lightning_bge.json").write_text(json.dumps({**content, "threshold": 0.5}))
    assert Schema.load(tmp_path) == Schema("binary", ("0", "1"), ("a",), 8, 0.5, WindowConfig())


def test_folder_without_a_schema(tmp_path: Path) -> None:
    assert Schema.load(tmp_path) is None
    assert Schema.load(tmp_path / "missing") is None


def test_schema_of_another_version_is_refused(tmp_path: Path) -> None:
    Schema("binary", ("0", "1"), ("a",), 8).save(tmp_path)
    path = tmp_path / "lightning_bge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(ConfigError, match=r"has schema version 2, this program reads 1: update lightning-bge"):
        Schema.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[1, 2]"])
def test_a_damaged_schema_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "lightning_bge.json").write_text(content)
    with pytest.raises(ConfigError, match=r"lightning_bge\.json (is damaged|has schema version None)"):
        Schema.load(tmp_path)
