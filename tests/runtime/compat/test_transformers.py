"""The private names of transformers that this package uses are there, and do what it needs of them."""

from __future__ import annotations

import torch
import transformers
from transformers import BertConfig, BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_bge.runtime.compat import transformers as compat

MISSING = "transformers {} has no {} any more: change `lightning_bge.runtime.compat.transformers`"


def test_the_attention_implementation_is_read() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    model = BertModel(config)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        message = MISSING.format(transformers.__version__, "PretrainedConfig._attn_implementation")
        assert compat.attention_implementation(model) == name, message


def test_a_layer_is_recomputed_in_the_backward_pass_if_that_is_set() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    model, calls = BertModel(config).train(), []
    layer = model.encoder.layer[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    layer.output.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for on in (True, False):
        compat.set_recomputed(layer, on)
        model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.sum().backward()
        found.append(len(calls))
        calls.clear()
    name = "GradientCheckpointingLayer._gradient_checkpointing_func"
    assert found == [2, 1], MISSING.format(transformers.__version__, name)
