"""Hides secrets in what a report shows: passwords, tokens and keys in configurations, URLs and command lines."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

HIDDEN = "(hidden)"
# a name is that of a secret where its last word is one of these: api_key, accessToken, HF_TOKEN, X-Amz-Signature
_SECRET_WORDS = {
    *("token", "password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets", "key", "keys", "apikey"),
    *("apikeys", "credential", "credentials", "auth", "authorization", "signature"),
}
_SECRET_ENDINGS = ("token", "password", "passwd", "apikey", "secret")  # of a last word such as `hftoken`
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LOGIN_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]+@", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"([\w.-]+)=([^&\s#'\",;]+)")
_BEARER = re.compile(r"(\bBearer\s+)[^\s'\"]+", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a name says that its value is a secret, in snake_case, kebab-case, camelCase or capitals."""
    words = _WORD.findall(name)
    last = words[-1].lower() if words else ""
    return last in _SECRET_WORDS or last.endswith(_SECRET_ENDINGS)


def hide_secrets(value: Any, name: str = "") -> Any:
    """Replace the secrets in plain data.

    Args:
        value: a configuration, or a part of one: dicts, lists, texts, numbers.
        name: the option that holds the value.

    Returns:
        A copy, in which the values of options with a secret's name, and logins and tokens in texts, are `(hidden)`.
    """
    if value is not None and not isinstance(value, bool) and is_secret_name(name):
        return HIDDEN
    if isinstance(value, dict):
        return {key: hide_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(one) for one in value]
    return hide_secrets_in_text(value) if isinstance(value, str) else value


def hide_secrets_in_text(text: str) -> str:
    """Replace logins in URLs, the values of `name=value` where the name is a secret's, and bearer tokens."""
    text = _LOGIN_IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _ASSIGNMENT.sub(lambda found: f"{found[1]}={HIDDEN}" if is_secret_name(found[1]) else found[0], text)
    return _BEARER.sub(rf"\1{HIDDEN}", text)


def hide_secrets_in_command(words: Sequence[str]) -> list[str]:
    """Replace the secrets in a command line: `--name=secret`, `--name secret`, and options within YAML values."""
    shown: list[str] = []
    secret = False
    for word in words:
        name, equals, value = word.partition("=")
        if secret and not word.startswith("--"):
            shown.append(HIDDEN)
        elif equals and is_secret_name(name):
            shown.append(f"{name}={HIDDEN}")
        elif equals and word.startswith("--"):
            shown.append(f"{name}={_hide_secrets_in_argument(value)}")
        else:
            shown.append(_hide_secrets_in_argument(word))
        secret = not equals and word.startswith("--") and is_secret_name(word)
    return shown


def _hide_secrets_in_argument(text: str) -> str:
    """Replace the secrets in an argument that may be YAML with options in it."""
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: such as the 30th of February
        return hide_secrets_in_text(text)
    if not isinstance(options, dict | list) or hide_secrets(options) == options:
        return hide_secrets_in_text(text)
    return yaml.safe_dump(hide_secrets(options), default_flow_style=True, sort_keys=False, width=10**6).strip()


def hide_secrets_in_yaml(text: str) -> str:
    """Replace the secrets in a YAML file; of its comments those at the beginning of a line are kept."""
    comments = [hide_secrets_in_text(line) for line in text.splitlines() if line.startswith("#")]
    options = yaml.safe_dump(hide_secrets(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return "\n".join([*comments, options])
