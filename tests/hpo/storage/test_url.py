from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.storage.url import PASSWORD, PASSWORD_FILE, parse_storage, read_password

SECRET = "s3cr3t-91"


def test_addresses_of_databases_and_proxies() -> None:
    database = parse_storage("postgresql+psycopg://me@db.example.org:5433/studies?sslmode=require")
    assert (database.kind, database.shown) == ("database", "postgresql+psycopg://me@db.example.org:5433/studies")
    proxy = parse_storage("grpc://login-node:13000")
    assert (proxy.kind, proxy.host, proxy.port) == ("grpc", "login-node", 13000)
    assert parse_storage("mysql+pymysql://me@db/studies").kind == "database"
    assert StudyConfig(storage="grpc://[::1]:13000").storage == "grpc://[::1]:13000"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg://me:{SECRET}@db/studies",
        f"postgresql+psycopg://me@db/studies?password={SECRET}",
        f"postgresql+psycopg://me@db/studies?sslmode=require&PASSWORD={SECRET}",
        f"mysql+pymysql://me:{SECRET}@db/studies",
        f"postgresql://me:{SECRET}@db/studies",
        f"sqlite://me:{SECRET}@/file.db",
        f"nonsense://me:{SECRET}@db/studies",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"hpo\.storage: expected a URL without a password.*{PASSWORD}") as found:
        parse_storage(text)
    assert SECRET not in str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        f"grpc://me:{SECRET}@host:1",
        f"postgresql+psycopg://me:{SECRET}@db:notaport/studies",
        f"me:{SECRET}@db/studies",
        f"postgresql+psycopg://me:{SECRET}:more@db:x:y/studies",
    ],
)
def test_a_url_that_cant_be_read_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_storage(text)
    assert SECRET not in str(found.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("studies", "without ://"),
        ("", "without ://"),
        ("postgresql://me@db/studies", "got postgresql://"),
        ("postgresql+psycopg2://me@db/studies", r"got postgresql\+psycopg2://"),
        ("postgresql+psycopg://me@db", "a database at the end"),
        ("redis://db", "got redis://"),
        ("sqlite:///study.db", "leave hpo.storage at null"),
        ("grpc://host", "expected grpc://host:port"),
        ("grpc://host:99999", "expected grpc://host:port"),
        ("grpc://host:13000/database", "expected grpc://host:port"),
    ],
)
def test_other_addresses_are_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        StudyConfig(storage=text)


def test_the_password_comes_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (PASSWORD, PASSWORD_FILE):
        monkeypatch.delenv(name, raising=False)
    assert read_password() is None
    file = tmp_path / "secret"
    file.write_text(f" {SECRET} \n")
    monkeypatch.setenv(PASSWORD_FILE, str(file))
    assert read_password() == f" {SECRET} "  # its line end alone is left out
    monkeypatch.setenv(PASSWORD, "other")
    with pytest.raises(ConfigError, match="got both"):
        read_password()
    monkeypatch.delenv(PASSWORD_FILE)
    assert read_password() == "other"


def test_a_password_file_that_cant_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=rf"{PASSWORD_FILE}: .*missing can't be read: No such file"):
        read_password()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_password()
