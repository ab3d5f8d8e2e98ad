from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.advisor.report.secrets import (
    HIDDEN,
    hide_secrets,
    hide_secrets_in_command,
    hide_secrets_in_text,
    hide_secrets_in_yaml,
    is_secret_name,
)


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "APIKey", "API_KEY", "apikey", "ACCESS_KEY", "awsSecretAccessKey", "aws.access-key"),
        *("token", "hub_token", "HF_TOKEN", "hfToken", "hftoken", "accessToken", "access_token2", "--x.authToken"),
        *("password", "PGPASSWORD", "dbPassword", "passwd", "passphrase", "pwd", "clientSecret", "client_secret"),
        *("credentials", "Authorization", "X-Amz-Signature", "api_keys"),
    ],
)
def test_names_of_secrets_in_every_spelling(name: str) -> None:
    assert is_secret_name(name)
    assert hide_secrets({"a": [{name: "s3cret"}]}) == {"a": [{name: HIDDEN}]}
    assert hide_secrets({name: ["s3cret", {"b": "s3cret"}]}) == {name: HIDDEN}
    assert (
        hide_secrets_in_text(f"https://host/x?size=3&{name}=s3cret#part")
        == f"https://host/x?size=3&{name}={HIDDEN}#part"
    )
    assert hide_secrets_in_command([f"--{name}=s3cret", f"--{name}", "s3cret", "--lr", "1"]) == [
        *(f"--{name}={HIDDEN}", f"--{name}", HIDDEN, "--lr", "1")
    ]
    assert "s3cret" not in hide_secrets_in_yaml(f"# see {name}=s3cret\nx: [{{{name}: s3cret}}]\n")


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer", "max_tokens", "maxTokens", "eval_max_tokens", "tokens", "token_bucket", "keyword", "keyFile"),
        *("monkey", "author", "", "use_fast", "passes", "secretary", "2026"),
    ],
)
def test_names_that_resemble_those_of_secrets(name: str) -> None:
    assert not is_secret_name(name)
    assert hide_secrets({name: "shown"}) == {name: "shown"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host/x", f"https://{HIDDEN}@host/x"),
        ("postgresql+psycopg://u:s3cret@db/optuna", f"postgresql+psycopg://{HIDDEN}@db/optuna"),
        ("ftp://u:s3cret@s3cret@h", f"ftp://{HIDDEN}@h"),
        ("host=db user=me password=s3cret port=1", f"host=db user=me password={HIDDEN} port=1"),
        ("with the header Bearer s3cret", f"with the header Bearer {HIDDEN}"),
        ("mail me@host, see https://host/a@b?tokens=3", "mail me@host, see https://host/a@b?tokens=3"),
    ],
)
def test_secrets_within_texts(text: str, shown: str) -> None:
    assert hide_secrets_in_text(text) == shown
    assert hide_secrets({"a": [text, (text,)]}) == {"a": [shown, [shown]]}
    assert hide_secrets_in_command(["--url", text, f"--url={text}"]) == ["--url", shown, f"--url={shown}"]


def test_secrets_in_yaml_arguments_of_a_command_line() -> None:
    command = ["--trainer.logger", "{class_path: W, init_args: {apiKey: s3cret}}", "--x=[{token: s3cret}]"]
    assert hide_secrets_in_command(command) == [
        "--trainer.logger",
        "{class_path: W, init_args: {apiKey: (hidden)}}",
        "--x=[{token: (hidden)}]",
    ]


def test_what_only_resembles_a_secret_is_shown() -> None:
    options: dict[str, Any] = {"data": {"tokenizer": "bge", "batching": {"max_tokens": "auto"}}, "keyword": "kept"}
    options |= {"token": None, "use_auth": True, "monitor": {"patience": 3}}
    assert hide_secrets(options) == options
    command = ["lightning-bge", "fit", "--data.batching.max_tokens", "4096", "--model.dropout=0.1", "2026-02-30"]
    command += ["--x", "{a: 1, b: [x, y]}", "--y=[a, 'b']"]
    assert hide_secrets_in_command(command) == command
