"""Whether a command may continue the run of a folder."""

from pathlib import Path
from typing import Any

from lightning_bge.cli.lightning_cli import BGECLI
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import StudyError
from lightning_bge.hpo.study import differences
from lightning_bge.runtime.dotted_config import BY_CONTENT, comparable
from lightning_bge.runtime.run_folder import absolute_folder, read_config, read_json
from lightning_bge.trainer import newest_checkpoint

EPOCHS = "trainer.max_epochs"


def contents(data: TextDataModule) -> dict[str, Any]:
    """What `run.json` has of the data besides the hash of the training file."""
    assert data.schema is not None
    return {"val_hash": data.val_hash, "test_hash": data.test_hash(), "labels": list(data.schema.labels)}


def check_same_run(cli: BGECLI, run_dir: Path, datamodule: TextDataModule) -> tuple[int, int] | None:
    """Refuse to continue a run of other options or other data.

    Paths, and options that change no result, may differ. More epochs than before are accepted. A run that has left
    neither a checkpoint nor a summary is not continued, so that it stands in the way of none.

    Returns:
        The epochs that the run had and those that it shall have, where these are more; else None.

    Raises:
        StudyError: the folder holds another run; the message lists the differences.
    """
    if not has_begun(run_dir):
        return None
    calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
    last = calls[-1] if calls else {}
    old = _comparable(read_config(run_dir), last.get("folder", "."))
    new = _comparable(cli.plain_config())
    if calls:
        found = contents(datamodule) | {"data_hash": datamodule.data_hash}
        for name in ("data_hash", "val_hash", "labels"):
            old[name], new[name] = last.get(name), found[name]
    epochs = more_epochs(old, new, run_dir)
    if calls and epochs is None and (run_dir / "summary.json").is_file():
        _check_test_file(run_dir, last.get("test_hash"), found["test_hash"])
    return epochs


def start_more_epochs(cli: BGECLI, run_dir: Path, epochs: tuple[int, int]) -> None:
    """Make a finished run one to be continued, and say what that means.

    Raises:
        StudyError: its checkpoints are gone, or its schedule can't be made longer.
    """
    old, new = epochs
    summary = read_json(run_dir / "summary.json")
    if summary is not None and newest_checkpoint(run_dir) is None:
        raise StudyError(
            f"{run_dir} is finished, and has no checkpoint left to go on from. To train its model further, start "
            f"another run with --model.name_or_path {run_dir / 'model'}"
        )
    schedule = cli.model.schedule_config
    if schedule.class_path is not None and schedule.epochs is None:
        raise StudyError(
            f"{run_dir} has a schedule by its class, {schedule.class_path}, whose length of {old} epochs is in the "
            f"checkpoint. To train its model further, start another run with --model.name_or_path {run_dir / 'model'}"
        )
    if schedule.epochs is not None and schedule.name != "constant":
        rate = f"the schedule of {schedule.epochs} epochs (model.schedule.epochs), at the end of which it is 0"
    else:
        rate = f"a schedule of {new} epochs" if schedule.name != "constant" else "its constant schedule"
    scored = "test" in (summary or {}) and cli.datamodule.has_test_rows
    tested = "; the test file is scored once more" if scored else ""
    print(f"going on from {old} to {new} epochs: from here on the learning rate is that of {rate}{tested}", flush=True)
    (run_dir / "summary.json").unlink(missing_ok=True)


def _comparable(config: dict[str, Any], start: str = ".") -> dict[str, Any]:
    found = comparable(config, BY_CONTENT)
    found["model.name_or_path"] = absolute_folder(str(found.get("model.name_or_path")), start)
    return found


def has_begun(run_dir: Path) -> bool:
    """Whether a folder holds a run that can be continued, or that has ended."""
    left = (run_dir / "summary.json").is_file() or newest_checkpoint(run_dir) is not None
    return left and (run_dir / "config.yaml").is_file()


def more_epochs(old: dict[str, Any], new: dict[str, Any], run_dir: Path) -> tuple[int, int] | None:
    """Compare the options of a run with those that are asked for, by dotted names; more epochs are no difference.

    Returns:
        The epochs that the run had and those that it shall have, where these are more; else None.

    Raises:
        StudyError: the folder holds another run; the message lists the differences.
    """
    before, after, more = old.get(EPOCHS), new[EPOCHS], None
    if isinstance(before, int) and isinstance(after, int) and 0 < before < after:
        old, more = {**old, EPOCHS: after}, (before, after)
    if different := differences(old, new):
        raise StudyError(
            f"{run_dir} holds another run. Differences:\n  "
            + "\n  ".join(different)
            + "\nName another --run_dir, or delete that folder."
        )
    return more


def _check_test_file(run_dir: Path, old: str | None, new: str | None) -> None:
    if None not in (old, new) and old != new:
        raise StudyError(
            f"{run_dir} is finished, and its scores are of another test file than data.test_file. To score this one, "
            f"run `lightning-bge test --model.name_or_path {run_dir / 'model'}` with it"
        )
    if old is None and new is not None:
        print(
            f"data.test_file is not scored, as {run_dir} was finished without it: run `lightning-bge test "
            f"--model.name_or_path {run_dir / 'model'}` with it",
            flush=True,
        )
