"""The options of experiment trackers, and what is checked of them before the first trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.trackers import config
from lightning_bge.hpo.trackers.config import TrackerConfig, check_trackers, local_folder, parse_trackers

SECRET = "hunter2-secret"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages are there, and no environment variable."""
    monkeypatch.setattr(config, "find_spec", lambda name: SimpleNamespace())
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")


def test_entries_are_names_or_mappings() -> None:
    found = parse_trackers(["tensorboard", {"name": "mlflow", "experiment": "team", "tracking_uri": None}])
    assert found == [TrackerConfig("tensorboard"), TrackerConfig("mlflow", {"experiment": "team"})]
    assert parse_trackers("wandb") == parse_trackers({"name": "wandb"}) == [TrackerConfig("wandb")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["comet"], "expected a list of mlflow, wandb, tensorboard.*got the name 'comet'"),
        ([{"experiment": "x"}], "got the name None"),
        (5, "expected a list of mlflow, wandb, tensorboard.*got int"),
        ([{"name": "mlflow", "tracking_uri": f"mysql://me:{SECRET}@host/mlflow"}], "password.*the database's driver"),
        ([{"name": "tensorboard", "folder": "x"}], "tensorboard has no option folder; it has none"),
        ([{"name": "wandb", "api_key": SECRET}], "wandb has no option api_key.*WANDB_API_KEY"),
        ({"name": "wandb", "api_key": SECRET}, "wandb has no option api_key.*WANDB_API_KEY"),
        ([{"name": "wandb", "mode": "sometimes"}], "expected online, offline, disabled for the mode"),
        (["wandb", {"name": "wandb"}], "each tracker once, got wandb several times"),
        (
            [{"name": "mlflow", "tracking_uri": f"postgresql://host/mlflow?user=me&password={SECRET}"}],
            "URI without a password or token.*such as ~/.pgpass",
        ),
        (
            [{"name": "mlflow", "tracking_uri": f"https://me:{SECRET}@host"}],
            "without a password or token.*MLFLOW_TRACKING_PASSWORD",
        ),
    ],
)
def test_wrong_entries_are_refused_and_no_value_is_repeated(entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        StudyConfig(trackers=entries)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed. Run: pip install 'lightning-bge\[{name}\]'"):
        check_trackers([name])


@pytest.mark.usefixtures("installed")
def test_a_login_in_the_environment_variable_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@host")
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: expected a URI without a password") as raised:
        check_trackers(["mlflow"])
    assert SECRET not in str(raised.value)


@pytest.mark.usefixtures("installed")
def test_wandb_needs_a_key_unless_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no key for api.wandb.ai. Set WANDB_API_KEY or run `wandb login`"):
        check_trackers(["wandb"])
    check_trackers([{"name": "wandb", "mode": "offline"}])
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    check_trackers(["wandb"])
    netrc.write_text(f"machine api.wandb.ai nonsense {SECRET}\n")
    with pytest.raises(ConfigError, match="can't be parsed") as raised:
        check_trackers(["wandb"])
    assert SECRET not in str(raised.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("./store", "store"),
        ("file:./store", "store"),
        ("file:///a/b%20c", "/a/b c"),
        ("sqlite:///mlflow.db", None),
        ("https://host/x", None),
        ("databricks", None),
        ("", None),
    ],
)
def test_a_tracking_uri_may_name_a_folder(uri: str, folder: str | None) -> None:
    assert local_folder(uri) == (None if folder is None else Path(folder))


@pytest.mark.usefixtures("installed")
def test_the_name_of_a_database_user_is_no_secret() -> None:
    check_trackers([{"name": "mlflow", "tracking_uri": "postgresql://me@host/mlflow"}])


@pytest.mark.parametrize("form", ["[tensorboard, {{name: wandb, api_key: {}}}]", "{{name: wandb, api_key: {}}}"])
def test_the_command_line_takes_them_and_shows_no_secret(run: Callable[..., tuple[int, str, str]], form: str) -> None:
    status, out, err = run("hpo", "--hpo.trackers", form.format(SECRET))
    assert status == 2
    assert "wandb has no option api_key" in err
    assert SECRET not in out + err
