"""The private names of transformers that this package uses are there, and do what it needs of them."""

from __future__ import annotations

import transformers
from transformers import BertConfig, BertModel

from lightning_bge.runtime.compat import transformers as compat

MISSING = "transformers {} has no {} any more: change `lightning_bge.runtime.compat.transformers`"


def test_the_attention_implementation_is_read() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    model = BertModel(config)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        message = MISSING.format(transformers.__version__, "PretrainedConfig._attn_implementation")
        assert compat.attention_implementation(model) == name, message
