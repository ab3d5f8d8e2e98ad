"""Files named on the command line or in a YAML file that do not exist, found before anything slow is imported."""

from pathlib import Path

import yaml

from lightning_bge.cli.arguments import named_values
from lightning_bge.cli.texts import load_texts
from lightning_bge.data.tables.files import FILE_OPTIONS, expand_files
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.paths import check_path


def check_files(args: list[str]) -> None:
    """Raise an error that names the first missing file.

    Args:
        args: a command's arguments: `-c FILE`, `--data.train_file FILE`, `--name=value` ...; later ones win, as in the
            parser that reads them afterwards.

    Raises:
        ConfigError: a YAML file does not exist, is no YAML, or has a key twice.
        DataError: a data file does not exist.
    """
    files: dict[str, str | list[str] | None] = {}
    for name, value in named_values(args):
        if name in ("-c", "--config") and value:  # without a value: left to the parser
            check_path("--config", value)
            files |= _data_files(Path(value).expanduser())
        elif name.removeprefix("--data.") in FILE_OPTIONS:
            files[name.removeprefix("--data.")] = _files(value)
    if any(arg in ("-h", "--help") or arg.startswith("--print_config") for arg in args):
        return
    for name, file in files.items():
        if file is not None and file != "null":
            for path in [file] if isinstance(file, str) else file:
                check_path(f"data.{name}", path)
            try:
                expand_files(file)
            except DataError as error:
                raise DataError(f"data.{name}: {error}") from error


def _files(value: str) -> str | list[str]:
    """One file, or a list of them as the parser reads it."""
    try:
        found = load_texts(value)
    except yaml.YAMLError:  # `[1].csv`
        return value
    return found if isinstance(found, list) else value


def _data_files(path: Path) -> dict[str, str | list[str] | None]:
    """The data files that a YAML file names."""
    if not path.is_file():
        raise ConfigError(f"--config: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        text = path.read_text(encoding="utf-8")
        content, texts = yaml.safe_load(text), load_texts(text)
    except ConfigError as error:
        raise ConfigError(f"--config: {path}, {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is not UTF-8 (byte {error.start + 1}). Save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {path} is no YAML file: {' '.join(str(error).split())}") from error
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        return {}
    names = [
        name for name in FILE_OPTIONS if isinstance(data.get(name), str | int | float | list | None) and name in data
    ]
    return {name: None if data[name] is None else texts["data"][name] for name in names}
