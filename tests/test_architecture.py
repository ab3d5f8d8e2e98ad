"""The allowed imports between the packages, and the public names of each package."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_bge
from tests.helpers.paths import ROOT
from tests.tools.private_names import is_private

MODULES = ["lightning_bge", *(found.name for found in pkgutil.walk_packages(lightning_bge.__path__, "lightning_bge."))]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as run; run()"]
    return subprocess.run(
        [*command, "--no-cache"], cwd=root, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)}
    )


def test_every_import_is_allowed() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("models/losses.py", "import lightning_bge.data.tokens.cache", "never import each other"),
        ("data/tables/labels.py", "from lightning_bge.models import losses", "never import each other"),
        ("types.py", "import lightning_bge.callbacks.throughput.monitor", "packages import downwards only"),
        ("callbacks/train_mode.py", "import optuna", "only hpo imports Optuna"),
        ("models/optimizer.py", "from lightning_bge import __version__", "nothing inside imports the package root"),
        ("data/tokens/cache.py", "from lightning_bge.data import datamodule", "inside data:"),
        ("hpo/steps.py", "from lightning_bge.hpo import study", "no import cycle"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "lightning_bge", tmp_path / "lightning_bge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "lightning_bge" / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # some versions of rich color what no terminal reads
    results = " ".join(plain.split()).split("Contracts: ")[0]  # long names are wrapped
    broken = [name for name, status in re.findall(r"(.*?) (KEPT|BROKEN)", results) if status == "BROKEN"]
    assert any(contract in name for name in broken), results


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert not [each for each in public if not hasattr(module, each)]


@pytest.mark.parametrize("package", ["data", "models", "callbacks", "hpo"])
def test_every_package_lists_its_public_names(package: str) -> None:
    assert importlib.import_module(f"lightning_bge.{package}").__all__


def test_modules_import_names_from_where_they_are_defined() -> None:
    """The lists of public names in `__init__` are for users: through them an import would pass by the contracts."""
    packages = {name for name in MODULES if hasattr(importlib.import_module(name), "__path__")}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{name.name}"
        for path in (ROOT / "lightning_bge").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in packages
        for name in node.names
        if f"{node.module}.{name.name}" not in MODULES
    ]
    assert found == []


def test_no_class_overrides_a_private_method_of_another_library() -> None:
    found = []
    for name in MODULES:
        if name.startswith("lightning_bge.runtime.compat"):
            continue
        for own in vars(importlib.import_module(name)).values():
            if not inspect.isclass(own) or own.__module__ != name:
                continue
            foreign = [base for base in own.__mro__ if not base.__module__.startswith("lightning_bge")]
            private = [each for each, value in vars(own).items() if is_private(each) and inspect.isfunction(value)]
            found += [
                f"{name}.{own.__name__}.{each} of {base.__module__}.{base.__name__}"
                for each in private
                for base in foreign
                if each in vars(base)
            ]
    assert found == []
