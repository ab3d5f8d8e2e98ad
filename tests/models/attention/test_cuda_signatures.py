"""What is called on a CUDA device alone exists in the oldest torch that is allowed, as in the installed one."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from lightning_bge.runtime.compat import torch as compat
from tests.helpers.paths import ROOT
from tests.helpers.torch_2_11 import NAMES, OPERATORS

USED = re.compile(r"\btorch\.(cuda|accelerator|nested|backends\.(?:cuda\.matmul|cuda|cudnn|mps)|mps|amp|_C)\.(\w+)")


def installed(schema: torch.FunctionSchema) -> torch.FunctionSchema:
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
    found: torch.FunctionSchema = getattr(packet, schema.overload_name or "default")._schema
    return found


@pytest.mark.parametrize("text", OPERATORS, ids=lambda text: text.partition("(")[0])
def test_an_operator_takes_the_same_calls_in_both(text: str) -> None:
    old = torch._C.parse_schema(f"aten::{text}")
    new = installed(old)
    for before, after in zip(old.arguments, new.arguments[: len(old.arguments)], strict=True):
        assert (before.name, str(before.type), before.kwarg_only) == (after.name, str(after.type), after.kwarg_only)
        assert before.has_default_value() == after.has_default_value()
        assert before.default_value == after.default_value
    assert all(argument.has_default_value() for argument in new.arguments[len(old.arguments) :])
    assert [str(one.type) for one in old.returns] == [str(one.type) for one in new.returns]


def test_the_flash_operators_of_the_oldest_torch_are_called() -> None:
    schemas = [torch._C.parse_schema(f"aten::{text}") for text in OPERATORS[:2]]
    assert [schema.name for schema in schemas] == ["aten::_flash_attention_forward", "aten::_flash_attention_backward"]
    wanted = ((compat.FORWARD_ARGUMENTS, 5), (compat.BACKWARD_ARGUMENTS, 3))
    for schema, (names, returns) in zip(schemas, wanted, strict=True):
        assert compat._has_signature(SimpleNamespace(_schema=schema), names, returns)
        assert not compat._has_signature(SimpleNamespace(_schema=schema), names[::-1], returns)


def test_names_of_modules_are_there_in_both() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "lightning_bge").rglob("*.py"):
        for module, name in USED.findall(path.read_text(encoding="utf-8")):
            if name != "matmul":  # a module
                found.setdefault(module, set()).add(name)
    assert found == NAMES, "look names up in torch 2.11 first, and remove those that are no longer used"
    for module, names in NAMES.items():
        owner = torch
        for part in module.split("."):
            owner = getattr(owner, part)
        assert all(hasattr(owner, name) for name in names - {"_cuda_clearCublasWorkspaces"}), module
