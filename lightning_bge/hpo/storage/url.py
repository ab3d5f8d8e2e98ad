"""The address of a study's storage: a database, or Optuna's gRPC proxy in front of one; never with a password in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from lightning_bge.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import URL

PASSWORD = "LIGHTNING_BGE_STORAGE_PASSWORD"  # environment variable
PASSWORD_FILE = "LIGHTNING_BGE_STORAGE_PASSWORD_FILE"  # as containers are given their secrets
EXPECTED = "postgresql+psycopg://user@host/database, mysql+pymysql://user@host/database, grpc://host:port, or null"
SECRET_PARAMETERS = ("password", "passwd", "sslpassword")
DRIVERS = {"postgresql+psycopg": "postgres", "mysql+pymysql": "mysql"}  # and the extras that install them


@dataclass(frozen=True)
class StorageURL:
    """Where a study is stored.

    Attributes:
        kind: a `database`, or a `grpc` proxy.
        text: the address, without a password.
        option: that named it, for messages.
        host: of the proxy.
        port: of the proxy.
    """

    kind: Literal["database", "grpc"]
    text: str
    option: str
    host: str = ""
    port: int = 0

    @property
    def shown(self) -> str:
        """The address in a message, without its parameters."""
        return self.text.partition("?")[0]


def parse_storage(text: str, option: str = "hpo.storage") -> StorageURL:
    """Check the address of a storage.

    Args:
        text: as the user typed it.
        option: its name, for messages.

    Raises:
        ConfigError: it has a password in it, or is no address of a storage that studies can be shared through. The
            message does not repeat a password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, mark, rest = text.partition("://")
    if not mark:
        raise ConfigError(f"{option}: expected {EXPECTED}, got a text without ://. A path is the run_dir of a study")
    if scheme == "grpc":
        return _parse_proxy(text, option)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # its text may hold a password, so it is not repeated
        raise ConfigError(f"{option}: expected {EXPECTED}, got a URL that can't be read") from None
    _check_no_password(url, option)
    if scheme.startswith("sqlite"):
        raise ConfigError(
            f"{option}: expected {EXPECTED}, got {scheme}. SQLite serves one machine alone, and so does the journal "
            "file in the run folder, which is faster: leave hpo.storage at null"
        )
    if scheme not in DRIVERS or not rest:
        raise ConfigError(f"{option}: expected {EXPECTED}, got {scheme}://...")
    if not url.database:
        raise ConfigError(f"{option}: expected a database at the end, as in {EXPECTED.split(',')[0]}, got {text}")
    return StorageURL("database", text, option)


def _parse_proxy(text: str, option: str) -> StorageURL:
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    if "@" in parts.netloc:
        raise ConfigError(
            f"{option}: expected grpc://host:port, got one with a login: the proxy has none. Leave out what is before @"
        )
    if not parts.hostname or port is None or parts.path.strip("/") or parts.query:
        raise ConfigError(f"{option}: expected grpc://host:port, such as grpc://login-node:13000, got another URL")
    return StorageURL("grpc", text, option, parts.hostname, port)


def _check_no_password(url: URL, option: str) -> None:
    found = [name for name in url.query if name.lower() in SECRET_PARAMETERS]
    if url.password is not None or found:
        raise ConfigError(
            f"{option}: expected a URL without a password, which would be seen in the list of processes and in the "
            f"run's files. Leave it out of the URL and set the environment variable {PASSWORD}, or {PASSWORD_FILE} to "
            "a file that holds it; for PostgreSQL PGPASSWORD and ~/.pgpass serve as well"
        )


def read_password() -> str | None:
    """The password of the database from the environment, or from a file that it names; None: there is none.

    Raises:
        ConfigError: both are set, or the file can't be read.
    """
    given, file = os.environ.get(PASSWORD) or None, os.environ.get(PASSWORD_FILE) or None  # "" unsets one
    if given is not None and file is not None:
        raise ConfigError(f"{PASSWORD} and {PASSWORD_FILE}: expected one of them, got both. Unset one of them")
    if file is None:
        return given
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{PASSWORD_FILE}: {file} can't be read: {reason}") from None
