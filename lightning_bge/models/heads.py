"""What follows the last layer of each architecture that can be packed: pooled token -> logits.

transformers' own code for a head is part of the whole model's forward pass, and reads padded sequences.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_bge.runtime.model_config import HEAD


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


def apply_head(model: Any, pooled: Tensor) -> Tensor:
    """Logits [N, outputs] of pooled vectors [N, hidden]: by the head of the architecture, or the one by its class."""
    if hasattr(model.config, HEAD):
        logits: Tensor = model.classifier(pooled)
        return logits
    return PACKED_HEADS[model.config.model_type](model, pooled)
