"""`hpo.trackers`: which experiment trackers have a run for each trial, and with which options."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from lightning_bge.errors import ConfigError, first_line

SECRETS = ("password", "passwd", "token")  # parameters of a URI
# trackers, their options, and the environment variables that credentials come from
OPTIONS = {"mlflow": ("tracking_uri", "experiment"), "wandb": ("project", "entity", "mode"), "tensorboard": ()}
CREDENTIALS = {
    "mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "wandb": "WANDB_API_KEY, or `wandb login`",
    "tensorboard": "none",
}
OF_DATABASES = "the file that the database's driver reads, such as ~/.pgpass for PostgreSQL"
# of `hpo.trackers`: a mapping first, as the command line's parser takes the first type that fits
Trackers = list[dict[str, Any] | str] | dict[str, Any] | str
OF_SQL = ("postgresql", "mysql", "sqlite", "mssql")  # schemes of MLflow's databases
WANDB_MODES = ("online", "offline", "disabled")
EXPECTED = f"a list of {', '.join(OPTIONS)}, or of mappings such as {{name: mlflow, experiment: my-team}}"


@dataclass(frozen=True)
class TrackerConfig:
    """One entry of `hpo.trackers`.

    Attributes:
        name: of the tracker.
        options: those that are set.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)


def parse_trackers(entries: Trackers) -> list[TrackerConfig]:
    """Check `hpo.trackers`.

    Args:
        entries: names of trackers, or mappings of `name` and options; a single one need not be in a list.

    Raises:
        ConfigError: a tracker or an option is unknown, a tracker is there twice, or there are credentials among the
            options. The message repeats no value of an option.
    """
    found = [_parse(entry) for entry in (entries if isinstance(entries, list) else [entries])]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"hpo.trackers: expected each tracker once, got {', '.join(twice)} several times")
    return found


def _parse(entry: str | Mapping[str, Any]) -> TrackerConfig:
    if not isinstance(entry, str | Mapping):
        raise ConfigError(f"hpo.trackers: expected {EXPECTED}, got {type(entry).__name__}")
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if name not in OPTIONS:
        raise ConfigError(f"hpo.trackers: expected {EXPECTED}, got the name {name!r}")
    known = OPTIONS[name]
    if unknown := [str(option) for option in given if option not in known]:
        raise ConfigError(
            f"hpo.trackers: {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}. "
            f"Credentials come from the environment: {CREDENTIALS[name]}"
        )
    options = {option: str(value) for option, value in given.items() if value is not None}
    if name == "mlflow" and "tracking_uri" in options:
        _check_no_login(options["tracking_uri"], "hpo.trackers: the tracking_uri of mlflow")
    if options.get("mode", "online") not in WANDB_MODES:
        raise ConfigError(f"hpo.trackers: expected {', '.join(WANDB_MODES)} for the mode of wandb, got another one")
    return TrackerConfig(name, options)


def _check_no_login(uri: str, where: str) -> None:
    parts = urlsplit(uri)
    login, is_there, _ = parts.netloc.rpartition("@")
    is_server = parts.scheme in ("http", "https")  # what is before @ may be a token alone
    if (is_there and (is_server or ":" in login)) or any(name.lower() in SECRETS for name in parse_qs(parts.query)):
        fix = f"set the environment variables {CREDENTIALS['mlflow']}" if is_server else f"give it in {OF_DATABASES}"
        raise ConfigError(
            f"{where}: expected a URI without a password or token, which would be seen in the run's files. Leave it "
            f"out, and {fix}"
        )


def check_trackers(entries: Trackers) -> None:
    """Check what the trackers need, before the first trial: packages, logins, a store that MLflow accepts.

    That a server answers is not checked: one that is away neither stops nor fails a study.

    Raises:
        ConfigError: something is missing; the message says what to do.
    """
    for tracker in parse_trackers(entries):
        if find_spec(tracker.name) is None:
            raise ConfigError(
                f"hpo.trackers: {tracker.name} is not installed. Run: pip install 'lightning-bge[{tracker.name}]'"
            )
        if tracker.name == "mlflow":
            _check_mlflow(tracker.options)
        elif tracker.name == "wandb":
            _check_wandb(tracker.options)


def _check_mlflow(options: Mapping[str, str]) -> None:
    _check_no_login(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI")
    uri = options.get("tracking_uri", os.environ.get("MLFLOW_TRACKING_URI", ""))
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if not uri or uri.startswith("databricks") or scheme in ("http", "https", *OF_SQL):
        return  # asking a server is left to the study, and a database would be created here
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(uri)
    except MlflowException as error:
        reason = short_reason(error).partition(". ")[0]
        allow = "" if local_folder(uri) is None else ", or the environment variable MLFLOW_ALLOW_FILE_STORE to true"
        raise ConfigError(
            f"hpo.trackers: mlflow does not accept {uri}: {reason}. Set tracking_uri to sqlite:///mlflow.db or to the "
            f"address of a server{allow}"
        ) from error


def local_folder(uri: str) -> Path | None:
    """The folder that a tracking URI of MLflow names; None: it names something else."""
    parts = urlsplit(uri)
    is_path = parts.scheme in ("", "file") and not uri.startswith("databricks")  # a name of MLflow's own
    return Path(unquote(parts.path)) if parts.path and is_path else None


def _check_wandb(options: Mapping[str, str]) -> None:
    if wandb_mode(options) != "online" or os.environ.get("WANDB_API_KEY"):
        return
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        logins = netrc.netrc(path).hosts if path.is_file() else {}
    except netrc.NetrcParseError:  # its text may hold a password
        raise ConfigError(f"hpo.trackers: wandb reads its key from {path}, which can't be parsed. Correct it") from None
    if host not in logins:
        raise ConfigError(
            f"hpo.trackers: wandb has no key for {host}. Set WANDB_API_KEY or run `wandb login`; with "
            "WANDB_MODE=offline none is needed, and `wandb sync` uploads the runs later"
        )


def wandb_mode(options: Mapping[str, str]) -> str:
    """How W&B works: the option `mode`, else WANDB_MODE, else online."""
    mode = options.get("mode") or os.environ.get("WANDB_MODE") or "online"
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)


def short_reason(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    return first_line(error)[:200]
