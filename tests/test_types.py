from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_bge.errors import ConfigError
from lightning_bge.types import TASKS, Batch, Schema, Task
from tests.helpers.small_models import cut_batch, micro_batch, random_sequences


def test_batch_counts_sequences_and_real_tokens() -> None:
    batch = cut_batch(random_sequences((9, 4, 7, 2, 2)), torch.arange(5.0), pieces=2)
    assert (batch.size, batch.tokens) == (5, 24)
    assert [micro.lengths for micro in batch.micro] == [(9, 7, 4), (2, 2)]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 2, 1, 3, 4]
    assert Batch((micro_batch(random_sequences((3,))),)).labels is None


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
    schema = Schema(task, labels, ("text_a", "text_b"), 77, threshold=0.1 + 0.2)
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema
    assert schema.num_outputs == outputs
    assert task in TASKS


def test_folder_without_a_schema(tmp_path: Path) -> None:
    assert Schema.load(tmp_path) is None
    assert Schema.load(tmp_path / "missing") is None


def test_schema_of_another_version_is_refused(tmp_path: Path) -> None:
    Schema("binary", ("0", "1"), ("a",), 8).save(tmp_path)
    path = tmp_path / "lightning_bge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(ConfigError, match=r"has schema version 2, this program reads 1: update lightning-bge"):
        Schema.load(tmp_path)
