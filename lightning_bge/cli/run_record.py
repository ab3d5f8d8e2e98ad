"""What a run folder says of how to repeat the run, and whether a command may continue in it."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_bge.cli.lightning_cli import BGECLI
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import StudyError
from lightning_bge.hpo.study import differences
from lightning_bge.runtime.dotted_config import comparable
from lightning_bge.runtime.run_folder import describe_run, read_json, write_json, write_text


def record_run(cli: BGECLI, run_dir: Path, datamodule: TextDataModule) -> None:
    """Write `config.yaml`, and `run.json` with one entry for each call."""
    config = cli.config
    write_text(run_dir / "config.yaml", yaml.safe_dump(cli.plain_config(), sort_keys=False))
    calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
    model = config.model
    calls.append(describe_run(config.seed_everything, datamodule.data_hash, model.name_or_path, model.revision))
    write_json(run_dir / "run.json", {"calls": calls})


def check_same_run(cli: BGECLI, run_dir: Path, datamodule: TextDataModule) -> None:
    """Refuse to continue a run of other options or other data.

    Raises:
        StudyError: the folder holds another run; the message lists the differences.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    old = comparable(yaml.safe_load(path.read_text(encoding="utf-8")))
    new = comparable(cli.plain_config())
    calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
    if calls:
        old["data"], new["data"] = calls[-1]["data_hash"], datamodule.data_hash
    if different := differences(old, new):
        raise StudyError(
            f"{run_dir} holds another run. Differences:\n  "
            + "\n  ".join(different)
            + "\nName another --run_dir, or delete that folder."
        )
