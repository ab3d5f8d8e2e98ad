"""BERT's layer for packed sequences: the same result, computed for no more tokens than are needed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bge.models.attention.packed import Packing, packed_attention

# Architectures whose layers are BERT's, and whose dropout rates are in modules alone.
BERT_LIKE = ("bert", "roberta", "xlm-roberta")


class PackedLayer(nn.Module):
    """Mixed into a layer of BERT, RoBERTa or XLM-RoBERTa by `use_packed_layers`; parameters and keys do not change.

    What differs from transformers' own forward: the layer's input is cast once for query, key and value under autocast,
    and the last layer may return each sequence's first token alone. A classifier reads nothing else, and what the layer
    would compute for the others has no influence on the output and no gradient: queries, output projection and
    feed-forward of T - N tokens, 10 of the layer's 12 matrices, are not computed.
    """

    first_tokens_only: bool
    attention: Any

    @property
    def stays_eager(self) -> bool:
        """Whether this layer must not be compiled: a graph for a batch of one sequence would be another one."""
        return self.first_tokens_only

    def forward(self, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
        """[1, T, hidden] -> the same, or [1, N, hidden] for `first_tokens_only`."""
        layer = self.attention.self
        residual = x = hidden_states[0]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        queries = x
        if self.first_tokens_only:
            first = packing.cu_seqlens[:-1]
            queries, residual = x.index_select(0, first), residual.index_select(0, first)
        heads = (1, -1, layer.num_attention_heads, layer.attention_head_size)
        q, k, v = (
            project(tokens).view(heads).transpose(1, 2)
            for project, tokens in ((layer.query, queries), (layer.key, x), (layer.value, x))
        )
        rate = layer.dropout.p if self.training else 0.0
        context = packed_attention(layer, q, k, v, None, packing=packing, dropout=rate, scaling=layer.scaling)[0]
        attended = self.attention.output(context[0].flatten(1), residual)
        return self.feed_forward_chunk(attended)[None]  # type: ignore[operator]


@cache
def _packed_class(layer: Any) -> type[nn.Module]:
    return type(f"Packed{layer.__name__}", (PackedLayer, layer), {})


def use_packed_layers(layers: nn.ModuleList, first_tokens_only: bool) -> None:
    """Make an encoder's layers compute packed sequences, in place.

    Args:
        layers: of BERT's kind, in order.
        first_tokens_only: whether the last one returns the first token of each sequence alone.
    """
    for layer in layers:
        layer.__class__ = _packed_class(type(layer))  # type: ignore[arg-type]
        layer.first_tokens_only = first_tokens_only and layer is layers[-1]  # type: ignore[assignment]
