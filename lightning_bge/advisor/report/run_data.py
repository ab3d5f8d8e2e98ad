"""What a run folder holds, read for a reader: no text of the user's data, and no secrets."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.history import History, read_history
from lightning_bge.runtime.run_folder import read_json

HIDDEN = "(hidden)"
_SECRET = r"(?:token|pass(?:word|wd|phrase)|pwd|secret|key|apikey|credentials?|auth(?:orization)?|signature)"
_SECRET_NAME = re.compile(rf"(?:^|[._-]){_SECRET}$", re.IGNORECASE)
_IN_URL = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&][\w.-]*{_SECRET}=)[^&\s#'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


@dataclass(frozen=True)
class RunFolder:
    """What a run has left so far.

    Attributes:
        path: the folder.
        history: the study; None: it is none, or has not begun.
        is_study: whether it belongs to a search.
        config: all settings.
        summary: the results; None: it has not ended.
        calls: one for each time it was started (`runs.describe_run`).
        epochs: what `fit` logged, an epoch each, by name.
        audit: what `lightning-bge audit` found; None: it was not run here.
        best: the winner's settings, as YAML.
    """

    path: Path
    history: History | None
    is_study: bool
    config: dict[str, Any]
    summary: dict[str, Any] | None
    calls: list[dict[str, Any]]
    epochs: list[dict[str, float]]
    audit: dict[str, Any] | None
    best: str | None

    @property
    def trials_done(self) -> bool:
        """Whether as many trials have ended as are planned, as far as config.yaml says."""
        history = self.history
        return history is not None and (history.planned is None or history.begun >= history.planned)

    @property
    def finished(self) -> bool:
        """Whether its results are those of all that was planned."""
        if not self.ended or self.summary is None:
            return False
        return self.history is None or (
            self.trials_done and not (self.summary.get("seed_replicates") or {}).get("missing")
        )

    @property
    def ended(self) -> bool:
        """Whether its results are those of all that has run, and nothing runs: it may have been given so many hours."""
        if self.summary is None or (self.history and self.history.going_on):
            return False
        if self.history is None:
            return True
        ended = sum(trial.outcome not in ("running", "waiting") for trial in self.history.trials)
        return self.summary.get("n_runs", self.summary.get("n_trials")) == ended


def read_run(run_dir: Path) -> RunFolder:
    """Read a run folder, without writing anything there.

    Raises:
        ConfigError: it is no run folder.
        StudyError: its journal is corrupt.
    """
    study, config = run_dir / "journal.log", run_dir / "config.yaml"
    if not study.is_file() and not config.is_file() and not (run_dir / "audit.json").is_file():
        found = "holds none of them" if run_dir.is_dir() else "is no folder" if run_dir.exists() else "does not exist"
        raise ConfigError(
            f"{run_dir}: expected the folder of a run of `lightning-bge hpo` or `fit`, with its journal.log or "
            f"config.yaml, but it {found}. Name the folder that --run_dir or run_dir: of that run names"
        )
    best = run_dir / "best.yaml"
    return RunFolder(
        path=run_dir,
        history=read_history(run_dir),
        is_study=study.is_file(),
        config=(yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {},
        summary=read_json(run_dir / "summary.json"),
        calls=(read_json(run_dir / "run.json") or {}).get("calls", []),
        epochs=read_epochs(run_dir / "logs"),
        audit=read_json(run_dir / "audit.json"),
        best=without_secrets_in_yaml(best.read_text(encoding="utf-8")) if best.is_file() else None,
    )


def read_epochs(logs: Path) -> list[dict[str, float]]:
    """What was logged in training and validation, an epoch each; an epoch that has not ended yet is left out.

    Args:
        logs: folder of Lightning's `version_0`, `version_1`..., one for each time that the run was started. Of an epoch
            that was trained again the later one counts.
    """
    found: dict[int, dict[str, float]] = {}
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name)):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                logged = {name: float(text) for name, text in row.items() if text and name and _is_number(text)}
                if "epoch" in logged and not any(name.startswith("test_") for name in logged):
                    found.setdefault(int(logged["epoch"]), {}).update(logged)
    # the last validation, of the epoch that counts, is logged under an epoch that was not trained
    return [found[epoch] for epoch in sorted(found) if any(name.startswith("train_") for name in found[epoch])]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------------- secrets


def without_secrets(value: Any, name: str = "") -> Any:
    """The same settings with those hidden whose name says token, password, key or the like, and logins in addresses."""
    if value is not None and not isinstance(value, bool) and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, dict):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    return clean(value) if isinstance(value, str) else value


def clean(text: str) -> str:
    """A text without the logins and the keys that stand in the addresses in it."""
    for found, instead in _IN_URL:
        text = found.sub(instead, text)
    return text


def clean_command(words: Sequence[str]) -> list[str]:
    """A command line, likewise: `--name=secret`, `--name secret`, and settings in a value that is YAML."""
    shown: list[str] = []
    secret = False
    for word in words:
        name, equals, value = word.partition("=")
        if secret and not word.startswith("--"):
            shown.append(HIDDEN)
        elif equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={HIDDEN}")
        elif equals and word.startswith("--"):
            shown.append(f"{name}={_clean_value(value)}")
        else:
            shown.append(_clean_value(word))
        secret = not equals and word.startswith("--") and bool(_SECRET_NAME.search(word))
    return shown


def _clean_value(text: str) -> str:
    """One of a command line; what is no YAML with settings in it is a plain text."""
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # such as the 30th of February
        return clean(text)
    if not isinstance(settings, dict | list) or without_secrets(settings) == settings:
        return clean(text)
    return yaml.safe_dump(without_secrets(settings), default_flow_style=True, sort_keys=False, width=10**6).strip()


def without_secrets_in_yaml(text: str) -> str:
    """The settings of a YAML file, likewise, with the comments at its head."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    plain = yaml.safe_dump(without_secrets(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return "\n".join([*(clean(line) for line in head), plain])
