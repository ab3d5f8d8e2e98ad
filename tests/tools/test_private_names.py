"""The check of private names finds each kind of them, and nothing that is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.private_names import check

FORBIDDEN = {
    "import torch._dynamo": "import of torch._dynamo",
    "from torch.utils import _pytree": "import of torch.utils._pytree",
    "from torch._utils import flatten": "import of torch._utils.flatten",
    "import torch\ntorch._softmax(1)": "attribute torch._softmax",
    "def f(study):\n    return study._storage": "attribute study._storage",
    "def f(x):\n    return getattr(x, '_name', None)": "getattr of _name",
    "def f(x):\n    setattr(x, '_name', 1)": "setattr of _name",
    "import sys\nsys.modules.get('torch._dynamo.utils')": "module torch._dynamo.utils by its name",
    "from torch import nn\nclass A(nn.Module):\n    f = lambda self: self._buffers": "attribute self._buffers",
    "from x import B\nclass A(B):\n    def _f(self):\n        return super()._f()": "attribute super()._f",
    "from lightning import Trainer\nTrainer.fit = None": "assignment to Trainer.fit",
    "import torch\ntorch.compile = None": "assignment to torch.compile",
    "import torch\ntorch.ops.aten._flash.default('_flash')": "attribute torch.ops.aten._flash",
}
ALLOWED = [
    "import torch\ntorch.backends.cudnn.benchmark = True",
    "class A:\n    def g(self):\n        self._x = 1\n    def f(self, other):\n        return self._x or other._x",
    "class A:\n    __slots__ = ('_x',)\n    def f(self):\n        return self._x",
    "class Base:\n    def _f(self): ...\nclass A(Base):\n    def g(self):\n        return self._f() or super()._f()",
    "def f(pair):\n    return pair._replace(a=1)",
    "from __future__ import annotations",
    "_limit = 1\nfor _ in range(_limit): ...",
]


def write(root: Path, name: str, source: str) -> None:
    path = root / "lightning_bge" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("source", FORBIDDEN, ids=FORBIDDEN.values())
def test_a_private_name_is_found(tmp_path: Path, source: str) -> None:
    write(tmp_path, "models/some.py", source)
    [found] = check(tmp_path)
    assert found.startswith("lightning_bge/models/some.py:")
    assert found.endswith(FORBIDDEN[source])


@pytest.mark.parametrize("source", FORBIDDEN, ids=FORBIDDEN.values())
def test_compat_may_use_it(tmp_path: Path, source: str) -> None:
    write(tmp_path, "runtime/compat/some.py", source)
    assert check(tmp_path) == []


@pytest.mark.parametrize("source", ALLOWED)
def test_what_is_allowed_is_not_found(tmp_path: Path, source: str) -> None:
    write(tmp_path, "models/some.py", source)
    assert check(tmp_path) == []
