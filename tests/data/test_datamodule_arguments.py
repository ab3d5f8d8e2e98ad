"""The arguments of a data module as plain data, and a data module under Lightning's own Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from tests.helpers.small_search import write_files


def test_hparams_make_an_equal_data_module(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> None:
    data = TextDataModule(
        tokenizer_dir,
        "multiclass",
        train_file=str(pairs_file),
        text_columns=("text_b",),
        batch_size=7,
        cache_dir=str(tmp_path / "cache"),
        table=TableConfig(labels=("yes", "no"), max_rows=50),
        split=SplitConfig(folds=3, seed=1),
        batching=BatchingConfig(max_tokens=60),
    )
    assert json.loads(json.dumps(data.hparams)) == data.hparams  # plain data, in JSON and in YAML
    assert data.hparams["split"] == {
        **{"folds": 3, "fold": 0, "val_fraction": 0.2, "stratified": True, "seed": 1},
        **{"outer_folds": None, "outer_fold": None},
    }
    assert data.hparams["text_columns"] == ["text_b"]
    same = type(data)(**yaml.safe_load(yaml.safe_dump(dict(data.hparams))))
    assert same.hparams == data.hparams
    assert (same.table, same.split, same.batching) == (data.table, data.split, data.batching)
    batches = []
    for module in (data, same):
        module.setup("fit")
        batches.append([[micro.rows.tolist() for micro in batch.micro] for batch in module.train_dataloader()])
    assert batches[0] == batches[1]
    assert (same.schema, same.folds_hash, same.data_hash) == (data.schema, data.folds_hash, data.data_hash)


def test_nested_configs_may_be_dicts(tokenizer_dir: str) -> None:
    data = TextDataModule(
        tokenizer_dir,
        table={"labels": ["n", "y"]},
        split={"folds": 3},
        batching={"seed": 7},  # type: ignore[arg-type]
    )
    assert data.table == TableConfig(labels=("n", "y"))
    assert data.split == SplitConfig(folds=3)
    assert data.batching == BatchingConfig(seed=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": {"fold_count": 3}}, "split has no key fold_count; its keys are folds, fold, val_fraction"),
        ({"split": {"folds": "3"}}, "split: a value has the wrong type"),
        ({"split": {"folds": 0}}, r"split\.folds must be at least 1, got 0"),
        ({"split": 3}, "split must be a SplitConfig or a dict of its fields, got 3"),
        ({"table": None}, "table must be a TableConfig or a dict of its fields, got None"),
        ({"batching": {"tokens": 3}}, "batching has no key tokens; its keys are max_tokens"),
        ({"batch_size": "8"}, "batch_size must be a whole number from 1 up, got '8'"),
        (
            {"task": "multilabel", "label_column": ["toxic"]},
            "two or more columns.*set model.task to binary and",
        ),
        ({"task": "multilabel", "label_column": ["a", "b", "a"]}, r"'a' is named twice in \['a', 'b', 'a'\]"),
        ({"max_length": True}, "max_length must be a whole number from 1 up, got True"),
    ],
    ids=str,
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextDataModule(**options)


@pytest.mark.parametrize("logged", [False, True])
def test_training_under_lightnings_own_trainer(tmp_path: Path, logged: bool) -> None:
    folder = write_files(tmp_path)
    data = TextDataModule(
        tokenizer=str(folder / "model"),
        train_file=str(folder / "train.csv"),
        test_file=str(folder / "train.csv"),
        max_length=32,
        batch_size=8,
        cache_dir=str(tmp_path / "cache"),
    )
    model = BGEClassifier(str(folder / "model"))
    logger = CSVLogger(tmp_path) if logged else False
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": logger, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, log_every_n_steps=2, default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2 * 4  # 32 of 40 rows in batches of 8
    [found] = trainer.test(model, datamodule=data, verbose=False)
    assert np.isfinite(found["test_loss"])


def test_lengths_of_each_split(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> None:
    data = TextDataModule(tokenizer_dir, train_file=str(pairs_file), cache_dir=str(tmp_path), max_length=12)
    with pytest.raises(RuntimeError, match="the train rows have not been read: call setup"):
        data.lengths("train")
    data.setup("fit")
    tokenizer = data.new_tokenizer()
    rows = [line.split("\t") for line in pairs_file.read_text().splitlines()[1:]]
    expected = [len(tokenizer(a, b, truncation=True, max_length=12)["input_ids"]) for a, b, *_ in rows]
    assert data.lengths("train").tolist() == data.lengths("val").tolist() == expected


def test_fewer_validation_rows_are_spread_over_the_lengths(
    tokenizer_dir: str, pairs_file: Path, tmp_path: Path
) -> None:
    split = SplitConfig(folds=3)
    data = TextDataModule(tokenizer_dir, train_file=str(pairs_file), cache_dir=str(tmp_path), split=split)
    data.setup("fit")
    whole, lengths = data.folds, data.lengths("train")
    data.limit_validation(5)
    for fold, before in zip(data.folds, whole, strict=True):
        assert set(fold) < set(before)
        assert fold.tolist() == sorted(fold)
        assert len(fold) == 5
        assert lengths[fold].min() == lengths[before].min()
    assert sorted([*data.train_rows, *data.val_rows]) == list(range(60))
