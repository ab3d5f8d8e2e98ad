"""A small BERT with its own tokenizer, built from texts: to try and to test everything without a download."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer

from lightning_bge.models.encoder import quiet_transformers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# about 1 / sqrt(hidden_size); BERT's 0.02 suits a width of 768 and leaves so narrow a model too flat to train fast
INIT_STD = 0.1
# scaled attention scores at the start, before the softmax: high enough that an equal word outweighs 500 others
SAME_WORD_SCORE = 12.0
OTHER_TEXT_SCORE = 5.7


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
    """Write a folder that transformers' Auto classes load: a WordPiece tokenizer and a `BertModel` in fp32.

    Nothing is pre-trained. From plain random weights a transformer does not find out, in the hundred steps that a quick
    trial has, that it should compare two texts: measured on the generated sample, it stays at the majority class. So
    the weights start near the identity, as in "Mimetic Initialization of Self-Attention Layers" (Trockman and Kolter,
    2023), with the two texts distinguished: in the first layer a token attends to equal tokens, in later ones to the
    other text. What counts as evidence is still to be learned.

    Args:
        folder: where to; it is created.
        texts: what the tokenizer's vocabulary is learned from.
        vocab_size: the most entries that the vocabulary may have.
        hidden_size: width, a multiple of `heads`; the feed-forward layers are as wide, to be fast.
        layers: number of layers; comparing two texts needs two.
        heads: attention heads a layer.
        max_positions: the longest sequence in tokens.
        seed: of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizer(vocab=_vocabulary(texts, vocab_size), do_lower_case=True, model_max_length=max_positions)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden_size,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=INIT_STD,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = BertModel(config)
        _start_by_comparing(model)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """Special tokens, letters, then whole words, the commonest first; other words are split into letters.

    Not the trainer of `tokenizers`: it breaks ties by hash order, so that each run would number the words differently.
    """
    splitter = BertWordPieceTokenizer(lowercase=True)
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in words for letter in word})
    ranked = sorted(words, key=lambda word: (-words[word], word))
    entries = dict.fromkeys([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *ranked])
    return {entry: number for number, entry in enumerate(list(entries)[:size])}


@torch.no_grad()
def _start_by_comparing(model: BertModel) -> None:
    """Add the identity to attention, and keep one coordinate of each head for the text that a token belongs to."""
    hidden, head_dim = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads
    text = torch.zeros(hidden)
    text[::head_dim] = 1
    embeddings = model.embeddings
    embeddings.word_embeddings.weight *= 1 - text
    embeddings.position_embeddings.weight *= 0.1  # an equal word elsewhere should have nearly the same embedding
    embeddings.token_type_embeddings.weight.copy_(5 * INIT_STD * torch.stack((text, -text)))
    for number, layer in enumerate(model.encoder.layer):
        attention = layer.attention.self
        if number == 0:
            query = key = (SAME_WORD_SCORE / head_dim**0.5) ** 0.5 * torch.diag(1 - text)
        else:
            query = (OTHER_TEXT_SCORE / head_dim**0.5) ** 0.5 * torch.diag(text)
            key = -query
        for linear, identity in (
            (attention.query, query),
            (attention.key, key),
            (attention.value, torch.eye(hidden)),
            (layer.attention.output.dense, torch.eye(hidden)),
        ):
            linear.weight.mul_(0.5).add_(identity)  # with less noise nearly every seed learns
