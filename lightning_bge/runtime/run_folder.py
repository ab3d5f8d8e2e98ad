"""Run folders: files that appear whole or not at all, and the record of how to repeat a run."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lightning_bge.errors import StudyError
from lightning_bge.runtime.locations import Location, RemotePath

SCHEMA_VERSION = 1
PACKAGES = ("lightning-bge", "torch", "lightning", "transformers", "tokenizers", "optuna", "torchmetrics", "numpy")


def create_run_dir(path: str | Path) -> Path:
    """Make the folder, readable by its owner alone: texts and scores can be confidential."""
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def create_folder(place: Location) -> None:
    """As `create_run_dir`; an object store has no folders."""
    if isinstance(place, Path):
        create_run_dir(place)


def write_atomically(path: Location, write: Callable[[Path], Any]) -> None:
    """Write a file through a draft beside it, so that a kill or a full disk leaves the old one as it was.

    What is not on this machine is uploaded from a temporary file, which an object store takes whole or not at all.

    Args:
        path: the file.
        write: called with the path of the draft, which only its owner can read.

    Raises:
        OSError: the disk is full, or the folder can't be written.
        LocationError: the location can't be written.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="lightning-bge-") as folder:
            write(Path(folder, path.name))
            path.upload(Path(folder, path.name))
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # else the name may reach the disk before the content does
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Location, text: str) -> None:
    """Write a text in UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8", newline=""))


def write_json(path: Location, content: dict[str, Any]) -> None:
    """Write JSON with a schema version, the one in `content` if it has one, as `write_text` does."""
    write_text(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"


def read_json(path: Location, schema_version: int = SCHEMA_VERSION) -> dict[str, Any] | None:
    """Read what `write_json` wrote; None where there is no such file, or one of another schema version.

    Raises:
        StudyError: the file is damaged.
    """
    if not path.is_file():
        return None
    content = _read_mapping(path, json.loads)
    return content if content.get("schema_version") == schema_version else None


def read_config(folder: Path) -> dict[str, Any]:
    """The options of a run, as plain data: its `config.yaml`.

    Raises:
        StudyError: the file is damaged.
    """
    return _read_mapping(folder / "config.yaml", yaml.safe_load)


def _read_mapping(path: Location, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise StudyError(f"{path} is damaged ({reason}). Restore it, or name another folder") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise StudyError(f"{path} is damaged: expected a mapping, got {kind}. Restore it, or name another folder")
    return content


def record_run(
    folder: Path, config: dict[str, Any], data_hash: str | None, more: Mapping[str, Any] | None = None
) -> None:
    """Write the options as `config.yaml`, and add one entry for this call to `run.json`.

    Args:
        folder: the run's folder.
        config: the options, as plain data.
        data_hash: of the training file.
        more: further content of the entry.
    """
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    calls = (read_json(folder / "run.json") or {}).get("calls", [])
    model = config.get("model", {})
    name = next((model[key] for key in ("name_or_path", "class_path") if key in model), config.get("build", ""))
    entry = describe_run(config["seed_everything"], data_hash, name, model.get("revision"))
    calls.append(entry | dict(more or {}))
    write_json(folder / "run.json", {"calls": calls})


def absolute_folder(name: str, start: str | Path = ".") -> str:
    """The absolute path of a folder that exists; another name, such as that of a model on the hub, is unchanged.

    Args:
        name: a path, or something else.
        start: where a relative path begins.
    """
    path = Path(start, Path(name).expanduser())
    return str(path.resolve()) if path.exists() else name


def describe_run(seed: int, data_hash: str | None, model: str, revision: str | None) -> dict[str, Any]:
    """What is needed to repeat a run: command, versions, machine, commit, seed, data, model."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        # `python -m lightning_bge.cli` is the same program under the path of a module
        "command": ["lightning-bge", *sys.argv[1:]] if Path(sys.argv[0]).name == "__main__.py" else sys.argv,
        "folder": os.getcwd(),
        "seed": seed,
        "data_hash": data_hash,
        "model": model,
        "model_revision": hub_commit(model, revision),
        "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the current folder's checkout, with `-dirty` where it has changes; None outside of one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def hub_commit(model: str, revision: str | None) -> str | None:
    """The commit behind a branch or tag of a model that the hub's cache holds; None for a folder."""
    if Path(model).expanduser().exists() or "/" not in model:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision
