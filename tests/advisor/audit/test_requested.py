from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_bge.advisor.audit.observe import Observation
from lightning_bge.advisor.audit.requested import Claims, claims_of
from tests.helpers.foreign_modules import Classifier


def claims(module: Classifier, **options: Any) -> Claims:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return claims_of(module, Trainer(accelerator="cpu", **off, **options), Observation())


@pytest.mark.parametrize(
    ("hparams", "claim", "value"),
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
    ],
)
def test_names_of_hyper_parameters_claim(hparams: dict[str, Any], claim: str, value: Any) -> None:
    assert getattr(claims(Classifier(**hparams)), claim) == value


def test_the_trainers_precision_and_the_models_attention_and_dropout_claim() -> None:
    found = claims(Classifier(), precision="bf16-mixed")
    assert (found.bf16, found.sdpa, found.dropout) == (True, True, True)
    found = claims(Classifier(attention="eager", dropout=0.0))
    assert (found.bf16, found.sdpa, found.dropout) == (None, False, None)


def test_what_the_user_says_counts_over_what_is_read() -> None:
    both = Claims(bf16=False, compile=True).over(Claims(bf16=True, fused=True))
    assert (both.bf16, both.compile, both.fused) == (False, True, True)
