"""Scores and labels for texts in memory, without a data module or a trainer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.models.encoder import TextClassifier, expand_home
from lightning_bge.models.metrics.predictions import scores
from lightning_bge.models.output.prediction_file import decide
from lightning_bge.runtime.model_config import read_tokenizer
from lightning_bge.tokenization import tokenize_rows
from lightning_bge.types import MicroBatch, Schema

Text = str | Sequence[str]


@dataclass(frozen=True)
class TextPredictions:
    """What a model predicts for texts, in their order.

    Attributes:
        scores: float32; probability of yes, [N] (binary), of each class, [N, C] (multi-class), of each label, [N, L]
            (multi-label); the value itself, [N] (regression).
        labels: N names: at the threshold (binary, multi-label: several joined by `|`), or of the highest score; None
            for a regression.
    """

    scores: Tensor
    labels: list[str] | None


def predict_texts(
    net: TextClassifier, schema: Schema, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> TextPredictions:
    """Tokenise, compute in eval mode, and decide.

    Args:
        net: the encoder with its head.
        schema: number of texts a row, length limit, windows, label names and threshold.
        texts: strings, or pairs of strings for a model of two texts.
        tokenizer: of the encoder; longer texts are truncated, or cut into windows, as in training.
        max_tokens: the most tokens that are computed at once; a longer text is computed alone.

    Raises:
        DataError: there is no text, or one has the wrong form, or leaves no room for windows.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise DataError(f"texts must be a list of strings or of pairs of strings, got {type(texts).__name__}")
    rows = [_row(number, text, schema) for number, text in enumerate(texts)]
    if not rows:
        raise DataError("texts must hold at least one text, got none")
    device = next(net.parameters()).device
    order: list[Tensor] = []
    logits: list[Tensor] = []
    training = net.training
    net.eval()
    try:
        with torch.inference_mode():
            for micro in encode_texts(rows, tokenizer, schema, max_tokens):
                order.append(micro.rows)
                logits.append(net(micro.to(device)).float().cpu())
    finally:
        net.train(training)
    score = scores(schema.task, torch.cat(logits)[torch.cat(order).argsort()])
    return TextPredictions(score, None if schema.task == "regression" else decide(schema, score))


def tokenizer_of(name_or_path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder.

    Raises:
        ConfigError: there is none that can be loaded.
    """
    name = expand_home(name_or_path)
    try:
        return read_tokenizer(name, revision, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} holds no tokenizer that can be loaded: pass `tokenizer` to predict") from error


def _row(number: int, text: Text, schema: Schema) -> tuple[str, ...]:
    row = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, tuple | list) else ()
    if len(row) != len(schema.text_columns) or not all(isinstance(part, str) for part in row):
        expected = " and ".join(schema.text_columns)
        form = "a string" if len(schema.text_columns) == 1 else "a pair of strings"
        raise DataError(f"texts[{number}] must be {form} ({expected}), got {text!r}")
    return row


def encode_texts(
    rows: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, schema: Schema, max_tokens: int
) -> Iterator[MicroBatch]:
    """All rows of one or two texts in micro-batches of at most `max_tokens` tokens, longest rows first."""
    found = tokenize_rows(rows, tokenizer, schema.max_length, schema.windows)
    counts = found.windows or [1] * len(rows)
    ends = list(accumulate(counts))
    sequences = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]  # of each row
    totals = [sum(len(found.input_ids[number]) for number in own) for own in sequences]
    order = sorted(range(len(rows)), key=lambda row: -totals[row])
    start = 0
    while start < len(order):
        part = order[start : start + max(max_tokens // max(totals[order[start]], 1), 1)]
        start += len(part)
        own = [number for row in part for number in sequences[row]]
        ids, types = [found.input_ids[number] for number in own], found.token_type_ids
        lengths = tuple(map(len, ids))
        yield MicroBatch(
            input_ids=torch.tensor(list(chain.from_iterable(ids))),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            lengths=lengths,
            rows=torch.tensor(part),
            token_type_ids=None if types is None else torch.tensor([kind for number in own for kind in types[number]]),
            windows=None if found.windows is None else tuple(counts[row] for row in part),
            pooling=schema.windows.pooling,
        )
