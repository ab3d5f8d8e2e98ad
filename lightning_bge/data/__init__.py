"""Rows -> token ids -> micro-batches."""

from lightning_bge.data.batching import (
    BatchingConfig,
    BatchLoader,
    EffectiveBatchSampler,
    EncodedDataset,
    EvalSampler,
    cut,
)
from lightning_bge.data.cache import TokenArrays, clear_cache, list_cache, tokenize_cached
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.labels import encode_labels, fit_labels
from lightning_bge.data.loading import LoaderChoice, choose_workers
from lightning_bge.data.sample import write_sample
from lightning_bge.data.splits import SplitConfig, folds_hash, make_folds
from lightning_bge.data.tables import Table, TableConfig, read_table
from lightning_bge.data.tokenizer import load_tokenizer, tokenizer_fingerprint

__all__ = [
    "BatchLoader",
    "BatchingConfig",
    "EffectiveBatchSampler",
    "EncodedDataset",
    "EvalSampler",
    "LoaderChoice",
    "SplitConfig",
    "Table",
    "TableConfig",
    "TextDataModule",
    "TokenArrays",
    "choose_workers",
    "clear_cache",
    "cut",
    "encode_labels",
    "fit_labels",
    "folds_hash",
    "list_cache",
    "load_tokenizer",
    "make_folds",
    "read_table",
    "tokenize_cached",
    "tokenizer_fingerprint",
    "write_sample",
]
