"""Storages that can't be opened, without a server; `test_postgres.py` has a real one."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from lightning_bge.cli.main import main
from lightning_bge.errors import ConfigError, UserError
from lightning_bge.hpo.storage import database
from lightning_bge.hpo.storage.database import check_answers, engine_options, open_shared_storage
from lightning_bge.hpo.storage.url import PASSWORD, parse_storage

POSTGRES = parse_storage("postgresql+psycopg://me@db/studies?sslmode=require", "--storage")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("postgresql+psycopg://me@db/studies", "psycopg", "postgres"),
        ("mysql+pymysql://me@db/studies", "pymysql", "mysql"),
    ],
)
def test_a_missing_driver_is_named_with_its_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"hpo\.storage: .* needs the package {package}, .*pip install 'lightning-bge\[{extra}\]'"
    for call in (check_answers, lambda one: open_shared_storage(one, patience=0.0)):
        with pytest.raises(ConfigError, match=message):
            call(parse_storage(url))


def test_missing_packages_of_the_proxy_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"grpcio and protobuf.*lightning-bge\[grpc\]"):
        check_answers(parse_storage("grpc://host:13000"))
    with pytest.raises(SystemExit):
        main(["proxy", "postgresql+psycopg://me@db/studies"])
    shown = capsys.readouterr()
    assert "lightning-bge[grpc]" in shown.err
    assert "serving" not in shown.out


def test_the_password_is_an_option_of_the_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "s3cr3t")
    options = engine_options(POSTGRES)
    assert options["connect_args"]["password"] == "s3cr3t"
    assert "s3cr3t" not in POSTGRES.text + POSTGRES.shown + repr(POSTGRES)
    monkeypatch.delenv(PASSWORD)
    assert "password" not in engine_options(POSTGRES)["connect_args"]


def test_parameters_of_the_url_count() -> None:
    own = "-c timezone=UTC -c idle_in_transaction_session_timeout=60000"
    assert engine_options(POSTGRES)["connect_args"]["options"] == own
    url = "postgresql+psycopg://me@db/studies?options=-csearch_path%3Dmine&connect_timeout=3&keepalives_idle=9"
    given = engine_options(parse_storage(url))["connect_args"]
    assert given["options"] == f"-csearch_path=mine {own}"  # takes the place of the URL's
    assert given.keys() == {"options", "application_name", "keepalives_interval", "tcp_user_timeout"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("connection refused\nIs the server running?", "does not answer: connection refused. Start the database"),
        ('FATAL: password authentication failed for user "me"', "refuses the login: FATAL: password"),
        ("(1045, \"Access denied for user 'me'@'host' (using password: YES)\")", "refuses the login: (1045"),
        ('FATAL: database "studies" does not exist', "does not exist. Create the database"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_one_line_on_each_error_of_a_database(
    text: str, expected: str, is_wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception = OperationalError("SELECT 1", {}, Exception(text))
    if is_wrapped:
        error, cause = StorageInternalError("during the commit"), error
        error.__cause__ = cause

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(database, "_open_database", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError) as found:
        open_shared_storage(POSTGRES, patience=600.0)
    message = str(found.value)
    assert message.startswith("--storage: postgresql+psycopg://me@db/studies")
    assert expected in message
    assert "sslmode" not in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpc://h:1"], "DATABASE: expected the URL of a database, got grpc://h:1"),
        (["postgresql+psycopg://me:s3cr3t@db/studies"], "DATABASE: expected a URL without a password"),
        (["postgresql+psycopg://me@db/studies", "--threads", "0"], "--threads: expected 1 to 10000, got 0"),
        (["postgresql+psycopg://me@db/studies", "--storage_timeout", "nan"], "--storage_timeout: expected 0 seconds"),
        (["postgresql+psycopg://me@db/studies", "--port", "70000"], "--port: expected 1 to 65535, got 70000"),
    ],
)
def test_what_the_proxy_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["proxy", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert "s3cr3t" not in error
