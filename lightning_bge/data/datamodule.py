"""The LightningDataModule: files and options in, loaders of effective batches out."""

import inspect
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.batches.micro_batches import EncodedDataset, concatenate_datasets
from lightning_bge.data.encoded_data_module import EncodedDataModule, Split
from lightning_bge.data.encoded_file import CheckedFile, Source, check_file, load_file, load_training_file
from lightning_bge.data.sources import exported_schema, known_schema, labels_origin, make_source, training_source
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import Files
from lightning_bge.data.tables.labels import count_classes, encode_labels
from lightning_bge.data.tables.overlap import warn_of_overlap, warn_of_overlap_of_folds
from lightning_bge.data.tables.readers import check_label_columns, check_text_columns
from lightning_bge.data.tables.splits import SplitConfig, validation_hash
from lightning_bge.data.tokens.tokenizer import load_tokenizer
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.nested_config import as_config, as_plain
from lightning_bge.tokenization import NO_WINDOWS, WindowConfig
from lightning_bge.types import TASKS, Schema, Task

log = logging.getLogger(__name__)

_TABLE, _SPLIT, _BATCHING = TableConfig(), SplitConfig(), BatchingConfig()


class TextDataModule(EncodedDataModule):
    """Rows of one or two texts from files, tokenized once, split into folds, in effective batches.

    Args:
        tokenizer: name or folder of the tokenizer; the command line takes the model's.
        task: binary, multiclass, multilabel or regression.
        train_file: rows to learn from: a file (.csv, .tsv, .jsonl, .json, .parquet; also .gz, .bz2, .zst), a pattern
            such as `parts/*.csv`, a folder that Hugging Face's `datasets` has saved, `hf://owner/name[/config][:split]`,
            or a list of them. The next three too.
        val_file: rows to validate on; unset: a part of train_file.
        test_file: rows to test on. With `split.outer_fold` those of the outer fold are, and there is no test file.
        predict_file: rows to predict; needs no labels.
        text_columns: one or two columns with text. Unset: those of an exported model that is evaluated; `query` and
            `passage` of FlagEmbedding's lines; else `text_a` and `text_b`.
        label_column: column with the label; for a multi-label task also one column for each label, with 1 or 0.
        group_column: rows of a group stay on one side of a split. Unset: rows are independent.
        max_length: longest sequence in tokens, special tokens counted; longer ones are truncated, the longer text
            first.
        batch_size: rows of an effective batch: those of one optimizer step, unless trainer.accumulate_grad_batches is
            more than 1, which multiplies it.
        cache_dir: folder for token ids. Unset: the environment variable LIGHTNING_BGE_CACHE, else
            ~/.cache/lightning-bge.
        cache_gb: what the tokenized texts in it may take, in units of 2**30 bytes, which is checked after each
            tokenization: files that were not used for longest are deleted, but none used within the last day. 20 by
            default: about fifteen files of a million rows with 256 tokens. Unset: no limit.
        table: how files are read. This and the next two may be dicts of their fields, such as `split={"folds": 3}`.
        split: how the training file is split.
        batching: how rows become batches.
        windows: sliding windows over texts that are longer than `max_length`. `predict`, `test` and `validate` take
            those of an exported model where this is unset.
        trust_remote_code: run code that comes with the tokenizer.
        revision: version of a tokenizer on the hub.

    Attributes:
        hparams: the arguments as plain data; `TextDataModule(**hparams)` is an equal data module.
        schema: what the model reads and predicts, after `setup`.
        folds: validation rows of each fold, empty with a `val_file`.
        folds_hash: sha256 of the folds.
        data_hash: sha256 of the training file's texts, labels and groups.
        val_hash: sha256 of the validation file's texts, labels and groups; None without such a file.
        tokenizer_hash: sha256 of the tokenizer's content, whatever its name.
        train_labels: encoded labels of all rows of the training file, and of those that `add_validation_rows` added.
        outer_rows: row numbers of the outer fold in the training file; empty without `split.outer_fold`.
        group_names: the groups of these rows, in the order of their numbers in a training micro-batch's `groups`.

    Raises:
        ConfigError: an argument has a wrong value, or does not go with another.
    """

    folds: tuple[np.ndarray, ...]

    # More than 10 arguments: each is an option that users type on the command line, and the frequent ones stay flat.
    def __init__(
        self,
        tokenizer: str = "",
        task: Task = "binary",
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        text_columns: tuple[str, ...] | None = None,
        label_column: str | tuple[str, ...] = "label",
        group_column: str | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        cache_dir: str | None = None,
        cache_gb: float | None = 20.0,
        table: TableConfig = _TABLE,
        split: SplitConfig = _SPLIT,
        batching: BatchingConfig = _BATCHING,
        windows: WindowConfig = NO_WINDOWS,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__(as_config(BatchingConfig, batching, "batching"))
        self.tokenizer, self.revision, self.trust_remote_code = tokenizer, revision, trust_remote_code
        self.task = task
        self.train_file, self.val_file = train_file, val_file
        self.test_file, self.predict_file = test_file, predict_file
        named = [text_columns] if isinstance(text_columns, str) else text_columns
        self.text_columns = None if named is None else tuple(named)
        self.label_column = label_column if isinstance(label_column, str) else tuple(label_column)
        self.group_column = group_column
        self.max_length, self.batch_size = max_length, batch_size
        self.cache_dir, self.cache_gb = cache_dir, cache_gb
        self.table = as_config(TableConfig, table, "table")
        self.split = as_config(SplitConfig, split, "split")
        self.windows = as_config(WindowConfig, windows, "windows")
        self._check_arguments()
        # no logger: the model's `revision` and `task` have the same names, which Lightning takes for a conflict
        names = inspect.signature(TextDataModule).parameters
        self.save_hyperparameters({name: as_plain(getattr(self, name)) for name in names}, logger=False)
        self.folds = ()
        self.folds_hash = self.data_hash = self.tokenizer_hash = ""
        self.val_hash: str | None = None
        self.train_labels: np.ndarray | None = None
        self.outer_rows = np.arange(0)
        self.group_names: tuple[str, ...] = ()
        self._val_group_names: tuple[str, ...] = ()
        self._trains_on_val_file = False
        self._trained_texts: np.ndarray | None = None  # hashes of the texts of the training file
        self._fold: int | None = self.split.fold

    def _check_arguments(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.text_columns is not None:
            check_text_columns(self.text_columns)
        if not isinstance(self.label_column, str) and self.task != "multilabel":
            raise ConfigError(f"label_column: a {self.task} task has one, got {list(self.label_column)}")
        check_label_columns(self.label_column)
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1 up, got {value!r}")
        if self.cache_gb is not None and not self.cache_gb > 0:
            raise ConfigError(f"cache_gb must be a number above 0, or null, got {self.cache_gb!r}")
        if self.val_file is not None and self.split.folds > 1:
            raise ConfigError(
                f"val_file and split.folds={self.split.folds} exclude each other: leave out val_file to "
                "validate on folds of the training file, or set folds to 1"
            )
        if self.split.outer_fold is not None:
            for name, value in (("val_file", self.val_file), ("test_file", self.test_file)):
                if value is not None:
                    raise ConfigError(
                        f"{name} and split.outer_fold={self.split.outer_fold} exclude each other: the rows outside of "
                        f"the outer fold are validated on, and those of the outer fold tested on. Leave out {name}"
                    )
        if self.batching.balanced and self.task not in ("binary", "multiclass"):
            raise ConfigError(f"batching.balanced needs classes, the task is {self.task}: set it to false")

    def prepare_data(self) -> None:
        """Read and tokenize in one process of each machine, which Lightning picks; the others then read its cache."""
        if self.trainer is not None:
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and split what the stage (fit, validate, test, predict; None: fit) needs; once.

        Raises:
            UserError: an argument, a file or its content is wrong.
        """
        if stage in ("fit", "validate", None):
            if self.train_file is not None or stage != "validate":
                self._setup_training(evaluates=stage == "validate")
            if self.val_file is not None and "val" not in self._datasets:
                self._setup_file("val", self.val_file)
        elif stage == "test" and "test" not in self._datasets:
            if self.split.outer_fold is not None:
                self._setup_training()
            else:
                self._setup_file("test", self.test_file)
        elif stage == "predict" and "predict" not in self._datasets:
            self._setup_file("predict", self.predict_file)

    def _setup_training(self, evaluates: bool = False) -> None:
        if "train" in self._datasets:
            return
        if self.train_file is None:
            raise ConfigError("train_file is not set")
        exported = exported_schema(self) if evaluates else None
        source = training_source(self, self.train_file, exported)
        training = load_training_file(source, self.task, self.split if self.val_file is None else None)
        file = training.file
        self.schema = Schema(
            *(self.task, training.label_names, source.text_columns, file.max_length),
            threshold=0.5 if exported is None else exported.threshold,
            windows=source.windows,
        )
        self._trained_texts = np.delete(file.text_hashes, training.outer)
        if training.folds:
            warn_of_overlap_of_folds(file.text_hashes, training.folds, str(file.names))
        if self.task == "binary":
            negative, positive = training.label_names
            text = f"{file.names}: {positive!r} is the positive label, {negative!r} the negative one"
            log_once(log, logging.INFO, f"{text}; --data.table.labels '[{positive}, {negative}]' exchanges them")
        self.folds, self.folds_hash, self.data_hash = training.folds, training.folds_hash, file.data_hash
        self.tokenizer_hash = file.tokenizer_hash
        self.train_labels, self.group_names = training.labels, file.group_names
        self.outer_rows = training.outer
        names = ["train", *(["val"] if self.val_file is None else []), *(["test"] if len(training.outer) else [])]
        rows, pooling = (file.tokens, training.labels, file.groups), source.windows.pooling
        for name in names:
            limit = self.micro_batch_size if name == "train" else self.eval_micro_batch_size
            self._datasets[name] = EncodedDataset(*rows, limit, pooling)

    def _setup_file(self, name: Split, files: Files | None) -> None:
        if files is None:
            raise ConfigError(f"{name}_file is not set")
        schema = self.schema = self.schema or known_schema(self, files)
        source = replace(make_source(self, files, schema.text_columns, schema.max_length), windows=schema.windows)
        file = load_file(self.predict_source() if name == "predict" else source)
        labels = None
        if file.raw_labels is not None:
            separator = self.table.label_separator
            names, origin = schema.labels, labels_origin(self, "train" in self._datasets)
            labels = encode_labels(file.raw_labels, names, schema.task, file.names, separator, origin)
        if self._trained_texts is not None and name != "predict":
            warn_of_overlap(file.text_hashes, self._trained_texts, str(file.names))
        if name == "val":
            self._val_group_names, self.val_hash = file.group_names, file.data_hash
            if common := set(file.group_names) & set(self.group_names):
                text = f"{len(common)} groups of {file.names} are in the training file too: scores will be too high"
                log_once(log, logging.WARNING, text)
        self.schema = replace(schema, max_length=file.max_length)
        limit, pooling = self.eval_micro_batch_size, schema.windows.pooling
        self._datasets[name] = EncodedDataset(file.tokens, labels, file.groups, limit, pooling)

    def predict_source(self) -> Source:
        """The file to predict, and how it is read; `schema` is set then, without reading or tokenizing the rows.

        Raises:
            ConfigError: `predict_file` is not set, the model was trained on another number of texts, or the names of
                its outputs are not known.
        """
        if self.predict_file is None:
            raise ConfigError("predict_file is not set")
        schema = self.schema = self.schema or known_schema(self, self.predict_file)
        source = make_source(self, self.predict_file, schema.text_columns, schema.max_length)
        return replace(source, windows=schema.windows, label_column=None, group_column=None)

    @property
    def num_folds(self) -> int:
        """Number of folds; 1 for a single split or a validation file."""
        return self.split.folds

    @property
    def num_train_rows(self) -> int:
        """Rows of the training file, whatever the fold, and those that `add_validation_rows` added.

        Without those of the outer fold, where there is one.
        """
        return len(self._dataset("train")) - len(self.outer_rows)

    @property
    def has_test_rows(self) -> bool:
        """Whether there are rows to test on: a test file, or the rows of an outer fold."""
        return self.test_file is not None or self.split.outer_fold is not None

    @property
    def train_rows(self) -> np.ndarray:
        """Row numbers (int64, from 0) that the selected fold learns from, in the training file.

        The rows that `add_validation_rows` added follow those of the training file.
        """
        rows = np.setdiff1d(np.arange(len(self._dataset("train"))), self.outer_rows)
        return rows if self._fold is None or not self.folds else np.setdiff1d(rows, self.folds[self._fold])

    @property
    def val_rows(self) -> np.ndarray:
        """Row numbers (int64, from 0) that the selected fold validates on, in the training or validation file."""
        if self._fold is None:
            return np.arange(0)
        return self.folds[self._fold] if self.folds else np.arange(len(self._dataset("val")))

    @property
    def class_counts(self) -> np.ndarray | None:
        """Training rows now selected of each class: binary (negative, positive), multi-class [C], multi-label [L]."""
        if self.train_labels is None or self.schema is None:
            return None
        return count_classes(self.train_labels[self.train_rows], self.schema)

    @property
    def validation_hash(self) -> str:
        """Sha256 (hex) of the validation rows of all folds, their labels and groups; after `setup("fit")`."""
        assert self.schema is not None
        rows = self._dataset("val")
        return validation_hash(self.schema, self.folds or (np.arange(len(rows)),), rows.labels, rows.groups)

    def test_hash(self) -> str | None:
        """Check the test file, and return the sha256 (hex) of its texts, labels and groups; None without such a file.

        After `setup("fit")`. It is tokenized only with windows, for which a pair may leave no room. `UserError`: the
        file, or a label in it, is wrong.
        """
        return None if self.test_file is None else self._check_test_file(self.test_file).data_hash

    def labels_and_groups(self, split: Split) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Encoded labels and group numbers of all rows of a split's file, as in `MicroBatch`; after `setup("fit")`.

        Without a `val_file` those of `val` are those of the training file. The test file is not tokenized for it.
        """
        if split == "test" and "test" not in self._datasets and self.test_file is not None:
            checked = self._check_test_file(self.test_file)
            return checked.labels, checked.groups
        rows = self._dataset(split)
        return rows.labels, rows.groups

    def _check_test_file(self, files: Files) -> CheckedFile:
        schema = self.schema or known_schema(self, files)
        source = make_source(self, files, schema.text_columns, schema.max_length)
        found = check_file(source, schema.task, schema.labels, labels_origin(self, "train" in self._datasets))
        if schema.windows.stride is not None:
            load_file(replace(source, windows=schema.windows))
        if self._trained_texts is not None:
            warn_of_overlap(found.text_hashes, self._trained_texts, str(found.names))
        return found

    def lengths(self, split: Split) -> np.ndarray:
        """Tokens of each row (int32 [N], special tokens counted) of a split's file, whatever the fold; after `setup`.

        With windows the tokens of all windows of a row. Without a `val_file` the rows of `val` are those of the
        training file: `val_rows` of them are validated on.
        """
        return self._dataset(split).tokens.lengths

    def select_fold(self, k: int | None) -> None:
        """Choose the fold to validate on (from 0); None: all rows of the training file train, nothing is validated."""
        if k is not None and not 0 <= k < self.num_folds:
            raise ConfigError(f"fold {k} does not exist, there are {self.num_folds}, counted from 0")
        if k is not None and self._trains_on_val_file:
            raise ConfigError(f"fold {k} can't be validated on: its rows are trained on. Make a new data module")
        self._fold = k

    def add_validation_rows(self) -> None:
        """Train on the rows of the validation file as well as on all of the training file; nothing is validated.

        After `setup("fit")`. The number of steps and the counts of classes are those of all these rows.

        Raises:
            ConfigError: there is no `val_file`.
        """
        if self.val_file is None:
            raise ConfigError("val_file is not set: there are no validation rows besides those of train_file")
        self.select_fold(None)
        if self._trains_on_val_file:
            return
        names = (self.group_names, self._val_group_names)
        both, self.group_names = concatenate_datasets(self._dataset("train"), self._dataset("val"), names)
        self._datasets["train"], self.train_labels, self._trains_on_val_file = both, both.labels, True

    def limit_validation(self, rows: int) -> None:
        """Validate on about `rows` rows of each fold, spread evenly over their lengths; the fold's other rows train.

        For measurements that need not take as long as a real validation; after `setup`.
        """
        lengths = self.lengths("train")
        by_length = [fold[np.argsort(lengths[fold], kind="stable")] for fold in self.folds]
        self.folds = tuple(np.sort(fold[:: max(1, len(fold) // rows)]) for fold in by_length)

    # ------------------------------------------------------------------ loaders

    def new_tokenizer(self) -> Any:
        """A fresh tokenizer, to be saved with an exported model: the one in use carries truncation settings."""
        return load_tokenizer(self.tokenizer, self.revision, self.trust_remote_code)

    def train_dataloader(self) -> BatchLoader:
        """Effective batches of the training rows, in a new random order each epoch."""
        dataset, rows = self._dataset("train"), self.train_rows
        dataset.set_rank(*self._rank())
        classes = self.train_labels[rows] if self.batching.balanced and self.train_labels is not None else None
        return BatchLoader(dataset, self._sampler(rows, classes), self.batching)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Micro-batches of the validation rows; empty while all rows train."""
        return [] if self._fold is None else self._eval_loader("val", self.val_rows)

    def test_dataloader(self) -> BatchLoader:
        """Micro-batches of the test file, or of the rows of the outer fold."""
        return self._eval_loader("test", self.outer_rows if self.split.outer_fold is not None else None)

    def predict_dataloader(self) -> BatchLoader:
        """Micro-batches of the file to predict; their `rows` are row numbers of that file."""
        return self._eval_loader("predict")
