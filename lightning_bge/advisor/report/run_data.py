"""The files of a run folder as plain data for `report` and `status`: no texts of the user's data, and no secrets."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_bge.advisor.audit.result import AUDIT_SCHEMA
from lightning_bge.advisor.report.secrets import hide_secrets, hide_secrets_in_command, hide_secrets_in_yaml
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.history import History, history_of
from lightning_bge.hpo.analysis.hours import time_left
from lightning_bge.hpo.analysis.journal import SUMMARY, load_shared_study, load_study
from lightning_bge.hpo.forecast.eta import Eta
from lightning_bge.hpo.storage.files import FILES
from lightning_bge.hpo.trials import N_TRIALS
from lightning_bge.models.metrics.names import metric_name
from lightning_bge.runtime.run_folder import read_config, read_json


@dataclass(frozen=True)
class RunData:
    """What a run has written so far.

    Attributes:
        path: the run folder.
        history: the study; None for a training run, and for a study that has not started.
        time_left: of a running study; None where nothing runs, or no trial has ended yet.
        is_study: whether it is the run of a study.
        config: the configuration.
        summary: the results; None until the run has ended.
        calls: one record for each start of the run (`describe_run`).
        epochs: of a training run, the logged values of each epoch by name.
        audit: the result of `lightning-bge audit`; None where it was not run in this folder.
        best: the best hyperparameters, as YAML.
    """

    path: Path
    history: History | None
    time_left: Eta | None
    is_study: bool
    config: dict[str, Any]
    summary: dict[str, Any] | None
    calls: list[dict[str, Any]]
    epochs: list[dict[str, float]]
    audit: dict[str, Any] | None
    best: str | None

    @property
    def metric(self) -> str | None:
        """The monitored metric of a training run; None where no file names it."""
        configured = (self.config.get("monitor") or {}).get("metric")
        return (self.summary or {}).get("metric") or (configured and metric_name(configured))

    @property
    def logged(self) -> str:
        """The name under which the monitored value of a training run is logged."""
        if "class_path" in (self.config.get("model") or {}):  # of another project
            return str(self.metric)
        tuned = (self.config.get("monitor") or {}).get("threshold") == "tuned"  # written where the metric has one alone
        return f"val_{'tuned_' if tuned else ''}{self.metric}"

    @property
    def trials_finished(self) -> bool:
        """Whether as many trials are finished as config.yaml asks for."""
        history = self.history
        return history is not None and (history.n_trials is None or history.n_finished >= history.n_trials)

    @property
    def finished(self) -> bool:
        """Whether the results are those of the whole run."""
        if not self.ended or self.summary is None:
            return False
        replicates = self.summary.get("seed_replicates") or {}
        return self.history is None or (self.trials_finished and not replicates.get("missing"))

    @property
    def ended(self) -> bool:
        """Whether nothing is running and the results cover all trials there are, though a timeout may have ended it."""
        if self.summary is None or (self.history and self.history.is_running):
            return False
        if self.history is None:
            return True
        ended = sum(trial.outcome not in ("running", "waiting") for trial in self.history.trials)
        return self.summary.get("n_runs") == ended


def read_run(run_dir: Path) -> RunData:
    """Read a run folder, without writing anything there.

    Args:
        run_dir: the folder of a run of `lightning-bge hpo` or `fit`.

    Raises:
        ConfigError: it is not a run folder.
        StudyError: its journal is corrupt.
    """
    study, config = run_dir / "journal.log", run_dir / "config.yaml"
    if not study.is_file() and not config.is_file() and not (run_dir / "audit.json").is_file():
        found = (
            "has neither of them" if run_dir.is_dir() else "is not a folder" if run_dir.exists() else "does not exist"
        )
        raise ConfigError(
            f"{run_dir}: expected the folder of a run of `lightning-bge hpo` or `fit`, with its journal.log or "
            f"config.yaml, but it {found}. Give the folder that the run had as its run_dir"
        )
    best = run_dir / "best.yaml"
    options = hide_secrets(read_config(run_dir) if config.is_file() else None) or {}
    calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
    loaded = load_study(run_dir)
    return RunData(
        path=run_dir,
        history=loaded and history_of(*loaded, options.get("hpo") or {}),
        time_left=loaded and time_left(*loaded, options.get("hpo") or {}),
        is_study=study.is_file() or bool((options.get("hpo") or {}).get("storage")),
        config=options,
        summary=hide_secrets(read_json(run_dir / "summary.json")),
        calls=[{**hide_secrets(call), "command": hide_secrets_in_command(call["command"])} for call in calls],
        epochs=read_epochs(
            run_dir / "logs", trained="train_" if "class_path" not in (options.get("model") or {}) else ""
        ),
        audit=read_json(run_dir / "audit.json", AUDIT_SCHEMA),
        best=hide_secrets_in_yaml(best.read_text(encoding="utf-8")) if best.is_file() else None,
    )


def read_shared_run(url: str, name: str) -> RunData:
    """Read a study from a storage that machines share; nothing of its run folder is needed.

    Args:
        url: of the storage.
        name: of the study.

    Raises:
        ConfigError: the URL is wrong, or the storage has no such study.
        StudyError: the storage does not answer.
    """
    loaded = load_shared_study(url, name, Path(name), "--storage")
    if loaded is None:
        raise ConfigError(
            f"RUN: {url} has no study {name} of `lightning-bge hpo`. With --storage, RUN is its hpo.study_name"
        )
    known = loaded.study.user_attrs
    methods = known["methods"]
    hpo = {"n_trials": known.get(N_TRIALS), "pruner": methods["hpo.pruner"], "sampler": methods["hpo.sampler"]}
    hpo["files"] = known.get(FILES, {}).get("location")
    return RunData(
        path=Path(name),
        history=history_of(*loaded, hpo),
        time_left=time_left(*loaded, hpo),
        is_study=True,
        config={"hpo": hpo},
        summary=known.get(SUMMARY),
        calls=[],
        epochs=[],
        audit=None,
        best=None,
    )


def read_epochs(logs: Path, trained: str = "train_") -> list[dict[str, float]]:
    """Read the metrics of training and validation that Lightning's CSVLogger wrote.

    Args:
        logs: folder with `version_0`, `version_1`..., one for each start of the run. Where two starts trained the same
            epoch, the later one counts.
        trained: begins the name of what a trained epoch logs; empty: anything.

    Returns:
        The logged values of each epoch by name; an epoch that has not ended is left out.
    """
    found: dict[int, dict[str, float]] = {}
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name)):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                logged = {name: float(text) for name, text in row.items() if text and name and _is_number(text)}
                if "epoch" in logged and not any(name.startswith("test_") for name in logged):
                    found.setdefault(int(logged["epoch"]), {}).update(logged)
    # the validation of the best checkpoint at the end is logged under an epoch that was not trained
    return [found[epoch] for epoch in sorted(found) if any(name.startswith(trained) for name in found[epoch])]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
