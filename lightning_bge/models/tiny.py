"""A small BERT with its own tokenizer, built from texts: to try and to test everything without a download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer

from lightning_bge.models.encoder import quiet_transformers


def build_tiny_bert(
    folder: str | Path,
    texts: Iterable[str],
    vocab_size: int = 1000,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    max_positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a folder that transformers' Auto classes load: a WordPiece tokenizer and a `BertModel` of random weights.

    Args:
        folder: where to.
        texts: what the tokenizer's vocabulary is learned from.
        vocab_size: the most entries that the vocabulary may have.
        hidden_size: width; the feed-forward layers are four times as wide.
        layers: number of layers.
        heads: attention heads a layer.
        max_positions: the longest sequence in tokens.
        seed: of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=1, show_progress=False)
    tokenizer = BertTokenizer(vocab=trainer.get_vocab(), do_lower_case=True, model_max_length=max_positions)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
        # BERT's 0.02 suits a width of 768; so narrow a model starts too flat with it and hardly moves in a few epochs
        initializer_range=0.02 * (768 / hidden_size) ** 0.5,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
