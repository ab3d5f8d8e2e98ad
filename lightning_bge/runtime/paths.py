"""Paths that will be written later, checked before anything else is done; nothing is made here."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_bge.errors import ConfigError


def check_path(option: str, path: str | Path) -> None:
    """Check that a text can be the name of a file or folder, whether it exists or not.

    Args:
        option: its name, for error messages.
        path: the text.

    Raises:
        ConfigError: it begins with `~` and the name of no user, is too long, or has a character that no name has.
    """
    try:
        Path(path).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except RuntimeError:  # of `expanduser`
        user = Path(path).parts[0]
        raise ConfigError(
            f"{option}: there is no user {user[1:]!r} whose home folder {user} could be, in {str(path)[:200]!r}. Write "
            "the whole path; a name that begins with ~ needs ./ before it"
        ) from None
    except (OSError, ValueError) as error:  # too long, a loop of links, a NUL character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: {str(path)[:200]!r} can't be a path ({reason}). Name another one") from None


def check_output(option: str, path: str | Path, inputs: Mapping[str, Iterable[str]] | None = None) -> None:
    """Check that a file can be written. Its folders may be missing: they are made where it is written.

    Args:
        option: its name, for error messages.
        path: the file, a device or a pipe; `~` is expanded, and links are followed.
        inputs: names of options, and the files or folders that they read; they must not be replaced.

    Raises:
        ConfigError: it is a folder or one that is read, a file stands where a folder is needed, or permission is
            missing.
    """
    target = Path(path).expanduser()
    for name, others in (inputs or {}).items():
        if any(_same(target, Path(other).expanduser()) for other in others):
            raise ConfigError(f"{option}: {path} is what {name} reads, and would be replaced. Name another file")
    if str(path).endswith(("/", os.sep)) or _is_dir(option, target):
        raise ConfigError(f"{option}: expected a file, got the folder {str(path)!r}. Add a file's name")
    if target.exists() and not target.is_file():  # a device or a pipe
        if not os.access(target, os.W_OK):
            raise ConfigError(f"{option}: no permission to write to {target}. Name another file, or change that")
        return
    _check_parents(option, target.resolve().parent)


def check_folder(option: str, path: str | Path, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Check that a folder can be made or written into.

    Args:
        option: its name, for error messages.
        path: the folder; `~` is expanded.
        files: names in it that will be files.
        folders: names in it that will be folders.

    Raises:
        ConfigError: it or a name in it is of the other kind, or permission is missing.
    """
    folder = Path(path).expanduser()
    _is_dir(option, folder)
    _check_parents(option, folder)
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(
                f"{option}: {folder / name} is a file, where a folder is needed. Move it, or name another"
            )
    for name in files:
        if (folder / name).is_dir():
            raise ConfigError(
                f"{option}: {folder / name} is a folder, where a file is needed. Move it, or name another"
            )


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _check_parents(option: str, folder: Path) -> None:
    """Check that files can be made in a folder, or the folder below those that exist."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        raise ConfigError(f"{option}: {nearest} is a file, where a folder is needed. Name another path, or move that")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: no permission to write in {nearest}. Name another path, or change that")


def _is_dir(option: str, path: Path) -> bool:
    """Whether it is a folder; a name that no file can have is an error."""
    check_path(option, path)
    return path.is_dir()


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one of them does not exist
        return False
