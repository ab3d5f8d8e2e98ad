from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.made_study import make_study

RUN = """
import sys
from lightning_bge.cli.main import main
main(sys.argv[1:3])
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("status", {"torch", "lightning", "transformers", "sklearn", "scipy", "plotly", "rich", "pandas"}),
        ("report", {"torch", "lightning", "transformers", "sklearn", "rich", "pandas"}),
    ],
)
def test_status_and_report_import_no_slow_library(tmp_path: Path, command: str, unused: set[str]) -> None:
    run = make_study(tmp_path / "run", 8)
    done = subprocess.run([sys.executable, "-c", RUN, command, str(run)], capture_output=True, text=True, check=True)
    imported = set(done.stdout.rpartition("imported:")[2].split())
    assert imported & unused == set()
    assert "optuna" in imported


def test_the_report_command_prints_its_path_alone(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 400)
    command = [sys.executable, "-m", "lightning_bge.cli", "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{run / 'report.html'}\n", "")
    assert "share of the variance" in (run / "report.html").read_text()
