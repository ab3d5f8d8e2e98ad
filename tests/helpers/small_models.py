"""Small models, tokenizers and micro-batches, made on the spot from transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    XLMRobertaTokenizer,
)

from lightning_bge.types import Batch, MicroBatch, Schema

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
OWN: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "mpnet": {},
    "distilbert": {"num_attention_heads": 2},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "type_vocab_size": 0,
    },
    # layers 0 and 3 see everything, 1 and 2 see 8 tokens to each side
    "modernbert": {
        "num_hidden_layers": 4,
        "global_attn_every_n_layers": 3,
        "local_attention": 16,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def small_config(kind: str, outputs: int = 1, dropout: float = 0.0, **changes: Any) -> PretrainedConfig:
    """A configuration with every dropout probability set to `dropout`."""
    config = AutoConfig.for_model(kind, **{**SIZES, **OWN[kind], **changes}, num_labels=outputs)
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float | int):
            setattr(config, name, dropout)
    return config


def small_model(kind: str, outputs: int = 1, dropout: float = 0.0, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Random weights far from their start, biases and norms too, so that nothing that is left out goes unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(small_config(kind, outputs, dropout, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.train()


def word_tokenizer(**options: Any) -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, **options)


def piece_tokenizer(**options: Any) -> XLMRobertaTokenizer:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], **options)


def save_model(folder: Path, kind: str = "bert", outputs: int = 1, dropout: float = 0.0, **changes: Any) -> str:
    """A small BERT or XLM-RoBERTa and its tokenizer in a folder."""
    small_model(kind, outputs, dropout, vocab_size=len(VOCABULARY), **changes).save_pretrained(folder)
    (word_tokenizer() if kind == "bert" else piece_tokenizer()).save_pretrained(folder)
    return str(folder)


def micro_batch(
    sequences: Sequence[Tensor],
    labels: Tensor | None = None,
    token_types: bool = False,
    rows: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> MicroBatch:
    """Sequences of token ids, end to end in the given order; of token types the second half of each is 1."""
    lengths = tuple(len(ids) for ids in sequences)
    types = torch.cat([(torch.arange(n) > n // 2).long() for n in lengths]) if token_types else None
    return MicroBatch(
        input_ids=torch.cat(list(sequences)),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        lengths=lengths,
        rows=torch.arange(len(lengths)) if rows is None else torch.tensor(rows),
        token_type_ids=types,
        labels=labels,
        groups=None if groups is None else torch.tensor(groups),
    )


def random_sequences(lengths: Sequence[int], vocabulary: int = 100, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=generator) for n in lengths]


def cut_batch(sequences: Sequence[Tensor], labels: Tensor, pieces: int) -> Batch:
    """An effective batch cut into so many micro-batches, longest sequences first."""
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    size = -(-len(order) // pieces)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return Batch(tuple(micro_batch([sequences[row] for row in rows], labels[rows], rows=rows) for rows in parts))


class Loader:
    """A list in a loader's place; Lightning takes a bare list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Batches(LightningDataModule):
    """Hand-made effective batches, with what `BGEClassifier` asks of a data module."""

    def __init__(
        self,
        schema: Schema,
        train: Sequence[Batch] = (),
        val: Sequence[Batch] = (),
        class_counts: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.class_counts = schema, class_counts
        self.train, self.val = Loader(train), Loader(val)

    def train_dataloader(self) -> Loader:
        return self.train

    def val_dataloader(self) -> Loader:
        return self.val

    def test_dataloader(self) -> Loader:
        return self.val

    def predict_dataloader(self) -> Loader:
        return self.val


def quiet_trainer(**changes: Any) -> Trainer:
    """A trainer on the CPU that writes and prints nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {**dict.fromkeys(off, False), "accelerator": "cpu", "num_sanity_val_steps": 0, "max_epochs": 1}
    return Trainer(**{**settings, **changes})
