"""Where files of several processes are: in a folder, or at a URL of fsspec, such as that of a bucket."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_bge.errors import ConfigError, LocationError
from lightning_bge.runtime.paths import check_path

_OF_THIS_MACHINE = ("file", "local")  # protocols of fsspec that name a folder
# a secret key may contain a slash; what is before @ in http may be a token alone
_PASSWORD = re.compile(r"://[^@]*:[^@]*@|^https?://[^/@]*@")


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder at a URL, with the methods of `pathlib.Path` that are needed.

    Nothing is cached: what other processes write or delete there is seen by the next call.

    Attributes:
        fs: fsspec's file system.
        path: as that file system names it.
        url: as the user names it.

    Raises:
        LocationError: any method, where the location can't be reached, or does not allow it.
    """

    fs: Any
    path: str
    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path}/{name}", f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self.fs, self.path.rpartition("/")[0], self.url.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is such a file; not `fs.isfile`, which takes any error for a no."""
        with self._reaching("read"):
            self.fs.invalidate_cache(self.path)
            try:
                return bool(self.fs.info(self.path)["type"] == "file")
            except FileNotFoundError:
                return False

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of a file."""
        with self._reaching("read"):
            return bytes(self.fs.cat_file(self.path)).decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file."""
        with self._reaching("deleted"):
            try:
                self.fs.rm_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def file_sizes(self) -> dict[str, int]:
        """As the function `file_sizes`."""
        with self._reaching("listed"):
            self.fs.invalidate_cache(self.path)
            found = self.fs.find(self.path, detail=True)
        start = len(self.path) + 1
        return {name[start:]: info.get("size") or 0 for name, info in found.items() if name != self.path}

    def upload(self, local: Path) -> None:
        """Write a file from one of this machine; an object store takes it whole or not at all."""
        with self._reaching("written"):
            self.fs.put_file(str(local), self.path)

    def download(self, local: Path) -> None:
        """Write its content into a file of this machine."""
        with self._reaching("read"):
            self.fs.get_file(self.path, str(local))

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Raise LocationError for whatever the library of the protocol raises, except for a full disk here."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _unreachable(self.url, what, error) from error


Location = Path | RemotePath


def check_location(option: str, text: str) -> None:
    """Check a folder's path, or a URL of fsspec, without reaching it.

    Args:
        option: its name, for error messages.
        text: the path or URL.

    Raises:
        ConfigError: it has a password in it, which would get into files and logs, or is neither of them.
    """
    protocol, mark, rest = text.partition("://")
    if not mark:
        if not text or re.match(r"[A-Za-z0-9+.-]+:", text):
            raise ConfigError(
                f"{option}: expected a folder, or a URL like s3://bucket/folder, got {text!r}. A folder with a colon "
                "in its name needs ./ before it"
            )
        check_path(option, text)
        return
    if _PASSWORD.search(text) or "?" in text:
        kind = "a query" if "?" in text else "a password"
        raise ConfigError(
            f"{option}: expected a URL without a password, key or token, got one with {kind} after {protocol}://. "
            "Leave it out, and give it in the environment, or in a file that the protocol's library reads: such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials, for s3; "
            "GOOGLE_APPLICATION_CREDENTIALS for gs; FSSPEC_SFTP_PASSWORD for sftp"
        )
    if "::" in text or not rest.strip("/"):
        raise ConfigError(f"{option}: expected one URL like s3://bucket/folder, got {text!r}")
    if protocol in _OF_THIS_MACHINE and not rest.startswith("/"):
        raise ConfigError(f"{option}: expected {protocol}:/// and an absolute path, got {text!r}")


def open_location(option: str, text: str) -> Location:
    """A folder's path, or a URL of fsspec, as something to write files into.

    Args:
        option: its name, for error messages.
        text: the path or URL. `file://` is a folder of this machine, or of one that all of them mount.

    Raises:
        ConfigError: as `check_location`, or the package for this kind of URL is not installed.
        LocationError: the location can't be reached.
    """
    check_location(option, text)
    protocol, mark, rest = text.partition("://")
    if not mark:
        return Path(text).expanduser().absolute()
    if protocol in _OF_THIS_MACHINE:
        return Path(rest)
    import fsspec  # only where it is needed

    url = text.rstrip("/")
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{option}: {protocol}:// needs another package: {error}, with `pip install`") from error
    except ValueError as error:
        known = ", ".join(["file", "s3", "gs", "abfs", "sftp"])
        raise ConfigError(f"{option}: {url}: {error}. Expected a protocol of fsspec, such as {known}") from error
    except Exception as error:  # some connect at once
        raise _unreachable(url, "reached", error) from error
    return RemotePath(fs, path.rstrip("/"), url)


def file_sizes(folder: Location) -> dict[str, int]:
    """Bytes of all files below a folder, by their names from there on, with `/`; empty where there is no folder.

    Other processes may write and delete there meanwhile.
    """
    if isinstance(folder, RemotePath):
        return folder.file_sizes()
    found, start = {}, len(str(folder)) + 1
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):
                found[path[start:].replace(os.sep, "/")] = os.stat(path).st_size
    return found


def delete_folder(folder: Location, first: str) -> None:
    """Delete a folder; `first`: the file in it without which the others are not read."""
    (folder / first).unlink(missing_ok=True)
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in file_sizes(folder):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A file as one of this machine: itself, or a temporary copy, which only its owner can read."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lightning-bge-") as folder:
        copy = Path(folder, path.name)
        path.download(copy)
        yield copy


@contextmanager
def local_folder(folder: Location) -> Iterator[Path]:
    """A folder as one of this machine: itself, or a temporary copy with all that is below it."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lightning-bge-") as place:
        for name in folder.file_sizes():
            copy = Path(place, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).download(copy)
        yield Path(place)


def _unreachable(url: str, what: str, error: Exception) -> LocationError:
    reason = " ".join(str(error).split())[:300]
    return LocationError(
        f"{url} can't be {what} ({type(error).__name__}{f': {reason}' if reason else ''}). Check that it exists, that "
        "it can be reached from here, and that the credentials allow to read, write, list and delete files there. "
        "Finished work is kept: the same command continues it"
    )
