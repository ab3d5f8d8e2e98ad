"""What follows the last layer of each architecture that can be packed: pooled token -> logits.

transformers' own code for a head is part of the whole model's forward pass, and reads padded sequences.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _bert_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.bert.pooler(pooled[:, None])))


def _roberta_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(pooled[:, None])


def _modernbert_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(model.drop(model.head(pooled)))


PACKED_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": _bert_head,
    "roberta": _roberta_head,
    "xlm-roberta": _roberta_head,
    "modernbert": _modernbert_head,
}
"""Model type -> head: ([N, hidden] of one token a sequence, or their mean) -> logits [N, outputs]. These architectures
route through transformers' attention interface."""
