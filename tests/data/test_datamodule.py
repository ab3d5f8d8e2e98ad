from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_bge.data import encoded_file
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.types import Schema
from tests.helpers.small_texts import build_tokenizer

Write = Callable[[str, "str | bytes"], Path]
Make = Callable[..., TextDataModule]


@pytest.fixture
def make(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> Make:
    def build(**options: Any) -> TextDataModule:
        default = {"tokenizer": tokenizer_dir, "train_file": str(pairs_file), "cache_dir": str(tmp_path / "cache")}
        return TextDataModule(**{**default, **options})

    return build


def rows_of(loader: Any) -> list[int]:
    return [row for batch in loader for micro in batch.micro for row in micro.rows.tolist()]


def test_a_single_split_of_the_training_file(make: Make) -> None:
    data = make()
    data.setup("fit")
    assert data.schema == Schema("binary", ("no", "yes"), ("text_a", "text_b"), 512)
    assert (data.num_folds, data.num_train_rows) == (1, 60)
    train, val = rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
    assert sorted(train + val) == list(range(60))
    assert len(val) == 12
    assert sorted(val) == data.val_rows.tolist()
    assert data.class_counts is not None
    assert data.class_counts.tolist() == [32, 16]
    assert data.train_labels is not None
    np.testing.assert_array_equal(data.train_labels, np.arange(60) % 3 == 0)
    batch = next(iter(data.train_dataloader()))
    assert batch.size == 32
    rows = np.concatenate([micro.rows for micro in batch.micro])
    np.testing.assert_array_equal(batch.labels, data.train_labels[rows])


def test_folds_keep_groups_together(make: Make) -> None:
    data = make(group_column="group", split=SplitConfig(folds=3, fold=1))
    data.setup("fit")
    assert len(data.group_names) == 12
    assert rows_of(data.val_dataloader()) != []
    assert sorted(rows_of(data.val_dataloader())) == data.folds[1].tolist()
    validated = []
    for fold in range(3):
        data.select_fold(fold)
        data.setup("fit")  # Lightning calls it in each fit; the fold stays
        train, val = rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
        assert sorted(train + val) == list(range(60))
        assert not {row // 5 for row in train} & {row // 5 for row in val}
        assert data.class_counts is not None
        assert data.class_counts.sum() == len(train)
        validated += val
    assert sorted(validated) == list(range(60))
    data.select_fold(None)
    assert sorted(rows_of(data.train_dataloader())) == list(range(60))
    assert data.val_dataloader() == []
    with pytest.raises(ConfigError, match="fold 3 does not exist"):
        data.select_fold(3)
    micro = next(iter(data.train_dataloader())).micro[0]
    assert [data.group_names[code] for code in micro.groups] == [f"g{row // 5}" for row in micro.rows.tolist()]


def test_a_validation_file_takes_the_place_of_folds(make: Make, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    val = write("val.csv", "text_a,text_b,label,group\nw1,w2,yes,g1\nw3,w4,no,other\n")
    data = make(val_file=str(val), group_column="group")
    data.setup("fit")
    assert (data.folds, data.num_folds) == ((), 1)
    assert sorted(rows_of(data.train_dataloader())) == list(range(60))
    (batch,) = data.val_dataloader()
    assert batch.micro[0].labels.tolist() == [1, 0]
    assert data.val_rows.tolist() == [0, 1]
    assert "1 groups of" in caplog.text
    data.select_fold(None)
    assert data.val_dataloader() == []
    with pytest.raises(ConfigError, match=r"val_file and split\.folds=3 exclude"):
        make(val_file=str(val), split=SplitConfig(folds=3))


def test_validation_rows_are_added_to_the_training_rows(make: Make, write: Write) -> None:
    rows = ["w1,w2,yes,g1", "w3 w4,w4,no,a", "w5,w6 w7,yes,z"]
    val = write("val.csv", "text_a,text_b,label,group\n" + "\n".join(rows) + "\n")
    options = {"val_file": str(val), "group_column": "group", "batch_size": 7}
    alone, data = make(**options), make(**options)
    for one in (alone, data):
        one.setup("fit")
    val_batches = [micro for batch in data.val_dataloader() for micro in batch.micro]
    data.add_validation_rows()
    data.add_validation_rows()  # once more changes nothing
    assert data.num_train_rows == 63
    assert data.class_counts is not None
    assert data.class_counts.tolist() == [41, 22]  # 40 and 20 of the training file
    loader = data.train_dataloader()
    assert len(loader) == 9
    assert sorted(rows_of(loader)) == list(range(63))
    assert data.val_dataloader() == []
    assert data.group_names == tuple(sorted({f"g{number}" for number in range(12)} | {"a", "z"}))
    # each row has the tokens, the label and the group of its file
    found = {}
    for micro in (micro for batch in loader for micro in batch.micro):
        ids = micro.input_ids.split(micro.lengths)
        for place, row in enumerate(micro.rows.tolist()):
            found[row] = (ids[place].tolist(), micro.labels[place].item(), data.group_names[micro.groups[place]])
    for micro in (micro for batch in alone.train_dataloader() for micro in batch.micro):
        ids = micro.input_ids.split(micro.lengths)
        for place, row in enumerate(micro.rows.tolist()):
            group = alone.group_names[micro.groups[place]]
            assert found[row] == (ids[place].tolist(), micro.labels[place].item(), group)
    for micro in val_batches:
        ids = micro.input_ids.split(micro.lengths)
        for place, row in enumerate(micro.rows.tolist()):
            assert found[60 + row] == (ids[place].tolist(), float(row != 1), ["g1", "a", "z"][row])
    with pytest.raises(ConfigError, match="fold 0 can't be validated on: its rows are trained on"):
        data.select_fold(0)


def test_balanced_batches_draw_from_added_validation_rows_too(make: Make, write: Write) -> None:
    val = write("val.csv", "text_a,text_b,label\n" + "w1,w2,yes\n" * 20)
    data = make(
        val_file=str(val), batching=BatchingConfig(balanced=True, num_workers=1)
    )  # a process that maps the file
    data.setup("fit")
    data.add_validation_rows()
    drawn = np.array(rows_of(data.train_dataloader()))
    assert len(drawn) == 80
    assert (drawn >= 60).any()
    assert 20 <= (np.asarray(data.train_labels)[drawn] == 1).sum() <= 60


def test_validation_rows_without_a_file_are_an_error(make: Make) -> None:
    data = make()
    data.setup("fit")
    with pytest.raises(ConfigError, match="val_file is not set"):
        data.add_validation_rows()


def test_hashes_follow_the_content_and_the_folds(make: Make, pairs_file: Path, tmp_path: Path) -> None:
    def hashes(**options: Any) -> tuple[str, str]:
        data = make(**options)
        data.setup("fit")
        return data.data_hash, data.folds_hash

    first = hashes()
    copy = tmp_path / "copy.tsv"
    copy.write_bytes(pairs_file.read_bytes())
    assert hashes(train_file=str(copy)) == first
    assert hashes(split=SplitConfig(seed=1))[0] == first[0]
    assert hashes(split=SplitConfig(seed=1))[1] != first[1]
    copy.write_text(pairs_file.read_text().replace("\tyes\t", "\tno\t", 1))  # noticed in spite of what is remembered
    assert hashes(train_file=str(copy))[0] != first[0]


def test_the_hash_of_the_validation_follows_rows_labels_and_groups_and_not_the_texts(
    make: Make, pairs_file: Path, tmp_path: Path
) -> None:
    def hash_of(**options: Any) -> str:
        data = make(**options)
        data.setup("fit")
        return data.validation_hash

    first = hash_of()
    assert hash_of(max_length=8, batch_size=5) == first
    assert hash_of(text_columns=("text_b",)) == first
    assert hash_of(split=SplitConfig(seed=1)) != first
    assert hash_of(group_column="group") != first
    assert hash_of(table=TableConfig(labels=("yes", "no"))) != first
    assert hash_of(table=TableConfig(max_rows=50)) != first
    assert hash_of(task="multiclass") != first
    val = tmp_path / "val.tsv"
    val.write_bytes(pairs_file.read_bytes())
    with_file = hash_of(val_file=str(val))
    assert hash_of(val_file=str(val), table=TableConfig(max_rows=50)) == with_file  # of the training file alone
    val.write_text(pairs_file.read_text().replace("\tyes\t", "\tno\t", 1))
    assert hash_of(val_file=str(val)) != with_file


def test_validation_and_test_files_have_hashes_of_their_own(make: Make, pairs_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text(pairs_file.read_text().replace("\tyes\t", "\tno\t", 1))
    data = make(val_file=str(other), test_file=str(pairs_file))
    data.setup("fit")
    assert (data.test_hash(), data.val_hash != data.data_hash) == (data.data_hash, True)
    assert "test" not in data._datasets  # it was not tokenized
    alone = make()
    alone.setup("fit")
    assert (alone.test_hash(), alone.val_hash) == (None, None)
    other.write_text(pairs_file.read_text().replace("\tyes\t", "\tmaybe\t", 1))
    wrong = make(test_file=str(other))
    wrong.setup("fit")
    with pytest.raises(DataError, match=r"label 'maybe'"):
        wrong.test_hash()


def test_a_second_data_module_reads_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make().setup("fit")

    def refuse(*args: Any) -> None:
        raise AssertionError("read, tokenized or split a second time")

    for name in ("read_table", "tokenize_cached", "hash_texts", "load_tokenizer", "make_folds", "encode_labels"):
        monkeypatch.setattr(encoded_file, name, refuse)
    second = make(batch_size=5)
    second.setup("fit")
    assert len(rows_of(second.train_dataloader())) == 48


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_labels_of_the_other_tasks(make: Make, write: Write, task: Any) -> None:
    cell = {"multiclass": lambda row: "abc"[row % 3], "multilabel": lambda row: ["a|b", "b", ""][row % 3]}
    lines = [f"w1 w{row % 40}\t{cell.get(task, lambda row: row / 7)(row)}" for row in range(30)]  # type: ignore[no-untyped-call]
    path = write("t.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    data = make(train_file=str(path), task=task, text_columns=["text"], split=SplitConfig(folds=3))
    data.setup("fit")
    assert data.schema is not None
    names, shape, outputs, counts = {
        "multiclass": (("a", "b", "c"), (30,), 3, [7, 7, 6]),
        "multilabel": (("a", "b"), (30, 2), 2, None),
        "regression": ((), (30,), 1, None),
    }[task]
    assert (data.schema.labels, data.schema.num_outputs, data.schema.text_columns) == (names, outputs, ("text",))
    assert data.train_labels is not None
    assert data.train_labels.shape == shape
    if task == "regression":
        assert data.class_counts is None
    elif task == "multilabel":
        np.testing.assert_array_equal(data.class_counts, data.train_labels[data.train_rows].sum(0))
    else:
        assert sorted(data.class_counts, reverse=True) == counts  # type: ignore[arg-type]


def test_max_rows_are_for_the_training_file(make: Make, pairs_file: Path) -> None:
    data = make(table=TableConfig(max_rows=20), test_file=str(pairs_file))
    data.setup("fit")
    data.setup("test")
    assert data.num_train_rows == 20
    assert len(rows_of(data.test_dataloader())) == 60


def test_balanced_batches_need_classes(make: Make) -> None:
    data = make(batching=BatchingConfig(balanced=True))
    data.setup("fit")
    assert data.train_labels is not None
    loader = data.train_dataloader()
    drawn = [
        data.train_labels[rows_of(loader)].mean() for epoch in range(20) if loader.sampler.set_epoch(epoch) is None
    ]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ConfigError, match="balanced needs classes"):
        make(task="regression", batching=BatchingConfig(balanced=True))


def test_the_micro_batch_size_changes_in_existing_loaders(make: Make) -> None:
    data = make()
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(next(iter(loader)).micro) == 1
    data.set_micro_batch_size(60)
    small = next(iter(loader))
    assert len(small.micro) > 1
    assert all(sum(micro.lengths) <= 60 for micro in small.micro)
    assert len(next(iter(data.train_dataloader())).micro) == len(small.micro)


def test_micro_batch_sizes_are_auto_or_fixed(make: Make) -> None:
    auto = make()
    auto.setup("fit")
    assert (auto.micro_batch_size, auto.eval_micro_batch_size, auto.auto_micro_batch_size) == (8192, 16384, True)
    old = auto.val_dataloader()
    auto.set_micro_batch_size(40)  # found, or after an OOM
    assert (auto.micro_batch_size, auto.eval_micro_batch_size, auto.auto_micro_batch_size) == (40, 80, True)
    assert auto.batching.max_tokens == "auto"
    for loader in (old, auto.val_dataloader()):  # the sampler of the old one has cut already
        totals = [sum(micro.lengths) for batch in loader for micro in batch.micro]
        assert len(totals) > 1
        assert max(totals) <= 80
        assert max(totals) > 40
    fixed = make(batching=BatchingConfig(max_tokens=100, eval_max_tokens=30))
    fixed.set_micro_batch_size(50)
    fixed.setup("fit")
    assert (fixed.micro_batch_size, fixed.eval_micro_batch_size, fixed.auto_micro_batch_size) == (50, 30, False)
    assert all(sum(micro.lengths) <= 30 for batch in fixed.val_dataloader() for micro in batch.micro)


def test_worst_case_batches(make: Make) -> None:
    data = make(max_length=16, group_column="group")
    data.setup("fit")
    assert (data.micro_batch_size_step, data.micro_batch_size_key) == (
        16,
        {"max_length": 16, "labels": 1, "eval_max_tokens": "auto"},
    )
    real = next(iter(data.train_dataloader())).micro[0]
    for train, sequences in ((True, 6), (False, 12)):
        [micro] = data.worst_case_batch(100, train).micro
        assert micro.lengths == (16,) * sequences
        assert micro.positions.tolist() == list(range(16)) * sequences
        assert micro.cu_seqlens.tolist() == list(range(0, 16 * sequences + 1, 16))
        assert set(micro.labels.tolist()) <= {0.0, 1.0}
        top = data._datasets["train"].tokens.input_ids.max()
        assert (micro.input_ids.min(), micro.input_ids.max()) >= (0, 0)
        assert micro.input_ids.max() <= top
        for name in ("input_ids", "positions", "cu_seqlens", "labels", "rows", "token_type_ids", "groups"):
            made, usual = getattr(micro, name), getattr(real, name)
            assert (made is None) == (usual is None), name
            assert made is None or (made.dtype, made.ndim) == (usual.dtype, usual.ndim), name
    same = data.worst_case_batch(100, True).micro[0]
    assert same.input_ids.tolist() == data.worst_case_batch(100, True).micro[0].input_ids.tolist()
    assert len(data.worst_case_batch(1, True).micro[0].lengths) == 1  # at least one sequence
    fixed = make(max_length=16, batching=BatchingConfig(eval_max_tokens=48))
    fixed.setup("fit")
    assert len(fixed.worst_case_batch(100, False).micro[0].lengths) == 3


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_worst_case_labels_are_of_the_tasks_form(make: Make, write: Write, task: str) -> None:
    labels = {"multiclass": ["x", "y", "z"], "multilabel": ["x|y", "z", "y"], "regression": ["1.5", "2", "0"]}[task]
    rows = [f"w{row} w1,w2 w{row % 7},{labels[row % 3]}" for row in range(30)]
    path = write("labels.csv", "text_a,text_b,label\n" + "\n".join(rows) + "\n")
    data = make(train_file=str(path), task=task, max_length=8, table=TableConfig(label_separator="|"))
    data.setup("fit")
    made, real = data.worst_case_batch(800, True).labels, next(iter(data.train_dataloader())).labels
    assert made is not None
    assert (made.dtype, made.shape[1:], len(made)) == (real.dtype, real.shape[1:], 100)
    assert {str(row) for row in made.tolist()} == {str(row) for row in real.tolist()}


def test_exported_folder_predicts_from_a_file_alone(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "export"
    build_tokenizer().save_pretrained(folder)
    Schema("multiclass", ("z", "b"), ("q", "d"), 7, 0.5).save(folder)
    path = write("new.csv", "d,q\n" + "\n".join(f"w{row} w3 w4 w5,w1 w2 w9 w8" for row in range(40)) + "\n")
    data = TextDataModule(str(folder), predict_file=str(path), test_file=str(path), cache_dir=str(tmp_path / "c"))
    data.setup("predict")
    assert data.schema == Schema("multiclass", ("z", "b"), ("q", "d"), 7)
    assert sorted(rows_of(data.predict_dataloader())) == list(range(40))
    (batch,) = data.predict_dataloader()
    assert batch.labels is None
    assert set(batch.micro[0].lengths) == {7}
    with pytest.raises(DataError, match="no column 'label'"):
        data.setup("test")
    labelled = write("test.csv", "d,q,label\nw1,w2,b\nw1,w2,z\n")
    tested = TextDataModule(str(folder), test_file=str(labelled), cache_dir=str(tmp_path / "c"))
    tested.setup("test")
    (batch,) = tested.test_dataloader()
    assert batch.labels.tolist() == [1, 0]  # the order of the model's outputs, not of the alphabet
    checked = TextDataModule(str(folder), val_file=str(labelled), cache_dir=str(tmp_path / "c"))
    checked.setup("validate")
    assert rows_of(checked.val_dataloader()) == [0, 1]


def test_names_without_a_schema(make: Make, pairs_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(pairs_file)

    def names(stage: str = "predict", **options: Any) -> tuple[str, ...]:
        data = make(predict_file=file, test_file=file, **options)
        data.setup(stage)
        assert data.schema is not None
        return data.schema.labels

    assert names() == names("test") == ("no", "yes")
    assert names(train_file=None, table=TableConfig(labels=("yes", "no"))) == ("yes", "no")
    with caplog.at_level(logging.INFO):
        assert names(train_file=None) == ("0", "1")
    assert "data.table.labels" in caplog.text
    assert names("test", train_file=None, task="regression", label_column="score") == ()
    with pytest.raises(ConfigError, match=r"set data\.table\.labels"):
        names(train_file=None, task="multiclass")
    with pytest.raises(DataError, match="not among the known labels '0', '1'"):
        names("test", train_file=None)


def test_unknown_label_in_the_test_file(make: Make, write: Write) -> None:
    data = make(test_file=str(write("t.csv", "text_a,text_b,label\nw1,w2,perhaps\n")))
    data.setup("fit")
    with pytest.raises(DataError, match=r"t\.csv: label 'perhaps' \(data row 1.* known labels 'no', 'yes'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "^task must be one of binary, .*, got 'ranking'"),
        ({"batch_size": 0}, "^batch_size must be a whole number from 1 up, got 0"),
        ({"max_length": 0}, "^max_length must be a whole number from 1 up, got 0"),
    ],
)
def test_wrong_arguments_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_missing_files_are_named(make: Make) -> None:
    for stage, name in (("fit", "train"), ("test", "test"), ("predict", "predict"), ("validate", "train")):
        data = make(train_file=None)
        if stage == "validate":
            data.setup(stage)
            with pytest.raises(RuntimeError, match="call setup"):
                data.val_dataloader()
        else:
            with pytest.raises(ConfigError, match=f"{name}_file is not set"):
                data.setup(stage)
    with pytest.raises(ConfigError, match=r"max_length must be at least 5"):
        make(max_length=3).setup("fit")


def test_new_tokenizer_is_clean(make: Make) -> None:
    data = make(max_length=8)
    data.setup("fit")
    assert data.new_tokenizer().backend_tokenizer.truncation is None


def test_options_of_the_command_line(tokenizer_dir: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    default = parser.parse_args([])
    assert default.data.text_columns is None
    assert default.data.split.val_fraction == 0.2
    text = ["--data.text_columns", "[q,d]", "--data.table.labels", "[n,y]", "--data.batching.max_tokens", "100"]
    data = parser.instantiate(parser.parse_args(text)).data
    assert (data.text_columns, data.table.labels, data.batching.max_tokens) == (("q", "d"), ("n", "y"), 100)
    help_text = parser.format_help()
    for option in (
        "maximum number of tokens of a training micro-batch",
        "rows of an effective batch",
        "several labels in one cell",
    ):
        assert option in " ".join(help_text.split())
