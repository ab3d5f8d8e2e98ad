"""What this package needs of transformers that has no public name: one function each, with its reason."""

from __future__ import annotations

from typing import Any


def attention_implementation(model: Any) -> str | None:
    """`eager`, `sdpa`, ... of a transformers model; None: it does not state one.

    `set_attn_implementation` is public, but nothing public reads what was set.
    """
    return getattr(model.config, "_attn_implementation", None)
