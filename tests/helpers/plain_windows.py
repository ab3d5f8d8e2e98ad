"""Sliding windows the slow and plain way: token ids without special tokens, cut by hand, one text at a time."""

from __future__ import annotations

from typing import Any


def plain_windows(tokenizer: Any, row: tuple[str, ...], max_length: int, stride: int) -> list[list[int]]:
    """Token ids of each window of a row for a BERT tokenizer: [CLS] (first [SEP]) part [SEP]."""
    *first, last = ([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in row)
    before = [tokenizer.cls_token_id, *(first[0] + [tokenizer.sep_token_id] if first else [])]
    size = max_length - len(before) - 1
    starts = [0]
    while starts[-1] + size < len(last):
        starts.append(starts[-1] + size - stride)
    return [[*before, *last[start : start + size], tokenizer.sep_token_id] for start in starts]


def plain_types(window: list[int], separator: int, pair: bool) -> list[int]:
    """Token types of a window: 1 after the first separator of a pair."""
    return [int(pair and separator in window[:place]) for place in range(len(window))]
