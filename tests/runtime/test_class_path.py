"""Classes by their path."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.class_path import check_class_option, find_class


@dataclass(frozen=True)
class Option:
    name: str = "usual"
    kept: int = 1
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)


def test_a_class_is_found() -> None:
    assert find_class("torch.nn.Linear", nn.Module, "x") is nn.Linear
    assert find_class("torch.nn.Linear", nn.Module, "x", imports=False) is nn.Linear


@pytest.mark.parametrize(
    "path", ["", "Linear", "torch.nn.", ".Linear", "torch.nn.Nope", "torch.no.Linear", "torch.relu"]
)
def test_what_is_no_class(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.x: expected a class, got "):
        find_class(path, nn.Module, "model.x: expected a class")


def test_nothing_is_imported_where_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_user.py").write_text("import torch.nn\nclass Loss(torch.nn.Module): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = "module_of_a_user.Loss"
    with pytest.raises(ConfigError, match=r"call `lightning_bge.models.allow_class\('module_of_a_user.Loss'\)`"):
        find_class(path, nn.Module, "x", imports=False)
    assert "module_of_a_user" not in sys.modules
    assert find_class(path, nn.Module, "x").__name__ == "Loss"
    assert find_class(path, nn.Module, "x", imports=False).__name__ == "Loss"
    monkeypatch.delitem(sys.modules, "module_of_a_user")


def test_options_beside_a_class() -> None:
    check_class_option(Option(), "model.x")
    check_class_option(Option(kept=2, class_path="a.B", init_args={"c": 1}), "model.x", kept=("kept",))
    with pytest.raises(ConfigError, match=r"model\.x\.kept: has no effect beside model\.x\.class_path.*got 2"):
        check_class_option(Option(kept=2, class_path="a.B"), "model.x")
    with pytest.raises(ConfigError, match=r"model\.x\.init_args: expected nothing without model\.x\.class_path"):
        check_class_option(Option(init_args={"c": 1}), "model.x")
    with pytest.raises(ConfigError, match="expected names and values"):
        check_class_option(Option(class_path="a.B", init_args=[1]), "model.x")  # type: ignore[arg-type]
