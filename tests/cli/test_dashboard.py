"""Optuna Dashboard on studies of both storages, in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial

from lightning_bge.cli.main import main
from lightning_bge.hpo.storage.url import PASSWORD
from lightning_bge.runtime.port import free_port
from tests.helpers.fake_study import fake_config, run_fake
from tests.helpers.made_study import journal_of, make_study
from tests.helpers.paths import ROOT
from tests.helpers.postgres import SECRET, Postgres

CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Run the command; the address at which it answers."""
    port = free_port()
    command = [sys.executable, "-m", "lightning_bge.cli", "dashboard", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, PASSWORD: SECRET}, stdout=subprocess.PIPE)
    address = f"http://localhost:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None
            assert time.monotonic() < until
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def check_trials(address: str, study: str, trials: Sequence[FrozenTrial]) -> None:
    """See that the study's page lists the trials, each with its state."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 2000})
        page.goto(address)
        page.get_by_text(re.compile(rf"^\d+\. {study}$")).click()
        page.wait_for_url("**/studies/*")
        page.goto(f"{page.url.rstrip('/')}/trials")
        expect(page.get_by_text(f"{len(trials)} Trials", exact=True)).to_be_visible()
        for trial in trials:
            row = page.get_by_role(
                "button", name=re.compile(rf"^Trial {trial.number} ?{trial.state.name}", re.IGNORECASE)
            )
            expect(row.first).to_be_visible()
        browser.close()


@pytest.mark.slow
def test_the_trials_of_a_journal_are_shown(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard", reason="make test-slow installs it")
    run = make_study(tmp_path / "run", 8)
    with served(str(run)) as address:
        check_trials(address, "run", optuna.load_study(study_name="run", storage=journal_of(run)).trials)


@pytest.mark.slow
def test_the_trials_of_a_database_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna_dashboard", reason="make test-slow installs it")
    pytest.importorskip("psycopg", reason="make test-slow installs it")
    monkeypatch.setenv(PASSWORD, SECRET)
    with Postgres() as server:
        study, _ = run_fake(tmp_path / "run", fake_config(n_trials=6, storage=server.url))
        with served("--storage", server.url) as address:
            check_trials(address, "run", study.trials)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected RUN or --storage, and not both"),
        (["run", "--storage", "grpc://h:1"], "expected RUN or --storage, and not both"),
        (["missing"], "RUN: expected the folder of a run"),
        (["run", "--port", "0"], "--port: expected 1 to 65535, got 0"),
        (["--storage", f"postgresql+psycopg://u:{SECRET}@h/d"], "--storage: expected a URL without a password"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", sys)  # it need not be installed
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert SECRET not in error


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    (tmp_path / "journal.log").touch()
    with pytest.raises(SystemExit):
        main(["dashboard", str(tmp_path)])
    assert "pip install 'lightning-bge[dashboard]'" in capsys.readouterr().err
