"""Modules of other packages, unmodified, through `hpo`, `plan`, `audit`, `fit` and each callback, in a short form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PYTHON = Path(os.environ.get("LIGHTNING_BGE_PROJECTS_ENV", f"{sys.prefix}-projects")) / "bin" / "python"
SCRIPT = ROOT / "examples" / "benchmarks" / "other_projects.py"
PROJECTS = ("pytorch_forecasting_nhits", "neuralforecast_nhits", "gluonts_deepar", "chemprop_mpnn")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_goes_through_all_commands_and_callbacks(name: str, tmp_path: Path) -> None:
    assert PYTHON.is_file(), f"{PYTHON} is missing: run `make test-slow`, which installs it"
    out = tmp_path / "found.json"
    command = [str(PYTHON), str(SCRIPT), name, "--trials", "3", "--epochs", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["projects"][name]
    assert found["hpo"]["n_trials"] == 3, done.stderr[-3000:]
    assert found["hpo"]["n_complete"] >= 1
    assert found["plan"]["seconds"] > 0
    assert found["audit"]["rows"] > 5
    assert set(found["callbacks"].values()) == {"works"}, found["callbacks"]
    assert found["fit"] == ("works" if (ROOT / "examples" / "projects" / f"{name}.yaml").is_file() else found["fit"])
