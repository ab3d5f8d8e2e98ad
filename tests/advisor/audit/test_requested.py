"""What is read from the objects and the hyperparameters of a run."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_bge.advisor.audit.observation import Observation
from lightning_bge.advisor.audit.requested import Requested, requested_by
from tests.helpers.foreign_modules import Classifier


def read(module: Classifier, **options: Any) -> Requested:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return requested_by(module, Trainer(accelerator="cpu", **off, **options), Observation())


@pytest.mark.parametrize(
    ("hparams", "request_name", "value"),
    [
        ({"use_torch_compile": True}, "compile", True),
        ({"use_torch_compile": False}, "compile", None),
        ({"compile": "max-autotune"}, "compile", True),
        ({"compile": "never"}, "compile", None),
        ({"use_torch_compile": False, "compile_mode": "default"}, "compile", None),
        ({"disable_compile": True}, "compile", None),
        ({"effective_batch_size": 64}, "effective_batch", 64),
        ({"target_batch": 32}, "effective_batch", 32),
        ({"batch_size": 16}, "effective_batch", None),
        ({"tf32": True}, "tf32", True),
        ({"optimizer": {"fused": True}}, "fused", True),
        ({"precision": "bf16-mixed"}, "bf16", True),
        ({"bf16": False}, "bf16", None),
        ({"fp16": True}, "fp16", True),
        ({"bfloat16": True}, "fp16", None),
    ],
)
def test_requests_are_read_from_the_names_of_hyperparameters(
    hparams: dict[str, Any], request_name: str, value: Any
) -> None:
    assert getattr(read(Classifier(**hparams)), request_name) == value


def test_requests_are_read_from_precision_attention_and_dropout() -> None:
    found = read(Classifier(), precision="bf16-mixed")
    assert (found.bf16, found.sdpa, found.dropout) == (True, True, True)
    found = read(Classifier(attention="eager", dropout=0.0))
    assert (found.bf16, found.sdpa, found.dropout) == (None, False, None)


def test_what_the_user_states_replaces_what_is_read() -> None:
    both = Requested(bf16=False, compile=True).with_defaults(Requested(bf16=True, fused=True))
    assert (both.bf16, both.compile, both.fused) == (False, True, True)
