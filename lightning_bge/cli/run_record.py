"""Whether a command may continue the run of a folder."""

from pathlib import Path

import yaml

from lightning_bge.cli.lightning_cli import BGECLI
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import StudyError
from lightning_bge.hpo.study import differences
from lightning_bge.runtime.dotted_config import comparable
from lightning_bge.runtime.run_folder import read_json


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
