"""The allowed imports between the packages, and the public names of each package."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_bge
from tests.helpers.paths import ROOT

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
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "lightning_bge", tmp_path / "lightning_bge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "lightning_bge" / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert len(broken) == 1
    assert contract in broken[0]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert not [each for each in public if not hasattr(module, each)]


@pytest.mark.parametrize("package", ["data", "models", "callbacks", "hpo"])
def test_every_package_lists_its_public_names(package: str) -> None:
    assert importlib.import_module(f"lightning_bge.{package}").__all__
