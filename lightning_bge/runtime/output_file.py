"""Files that the user names: their permissions follow the umask, links are followed, devices are never replaced."""

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}
_MOST_LINKS = 40  # as Linux follows them


def is_stream(path: str | Path) -> bool:
    """Whether a path names a device, a pipe or an open descriptor, which can be written to but not replaced.

    `/dev/stdout` is one even where the shell has sent it to a file.
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = Path(path).expanduser().stat().st_mode
    except (OSError, ValueError):  # there is none, or no file can have this name, which is checked elsewhere
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_stream(path: str | Path) -> BinaryIO:
    """A device, a pipe or an open descriptor, to write to; a pipe waits for its reader."""
    descriptor = _descriptor(path)
    if descriptor is not None:
        return os.fdopen(os.dup(descriptor), "wb")
    return open(os.open(Path(path).expanduser(), os.O_WRONLY), "wb")


def _descriptor(path: str | Path) -> int | None:
    """The number of the open file that a path or a link to it names, as `/dev/stdout` and `/dev/fd/3` do."""
    name = os.path.abspath(Path(path).expanduser())
    for _ in range(_MOST_LINKS):
        if name in _STANDARD:
            return _STANDARD[name]
        if found := re.fullmatch(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)", name):
            return int(found[1] or found[2])
        if not os.path.islink(name):
            break
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def output_target(path: str | Path) -> Path:
    """The file behind `~` and links, which may not exist yet; its folder is made."""
    target = Path(path).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def output_mode(target: Path) -> int:
    """The permissions that a file is to have: its own, if it exists, else those that the umask leaves."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0o077)  # the only way to read it; a file that another thread makes meanwhile is private
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A draft beside a file, which replaces it at the end, or is deleted where an error is raised.

    Args:
        target: the file, as `output_target` gives it.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}-", dir=target.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        put_in_place(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def put_in_place(draft: Path, target: Path) -> None:
    """Give a complete file its name, and the permissions of the one that it replaces or of the umask."""
    draft.chmod(output_mode(target))
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # else the name may reach the disk before the content does
    os.replace(draft, target)


def write_output_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 into a file that the user names, whole or not at all; a device or a pipe is written to."""
    if is_stream(path):
        with open_stream(path) as stream:
            stream.write(text.encode())
        return
    with replacing(output_target(path)) as draft:
        draft.write_text(text, encoding="utf-8", newline="")
