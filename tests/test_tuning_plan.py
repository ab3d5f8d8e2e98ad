"""`plan` from Python: the figures of the command line, and errors that name arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.locations import file_sizes
from lightning_bge.runtime.run_folder import write_text
from lightning_bge.tuning import plan
from tests.helpers.memory_location import memory_location
from tests.helpers.small_search import write_files

SPACE = {
    "model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
    "data.batch_size": CategoricalDistribution([4, 8]),
}
FAST = {"precision": "32-true", "accelerator": "cpu"}
GIVEN = {"step_ms": 20.0, "start_s": 5.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def model(files: Path) -> BGEClassifier:
    return BGEClassifier(str(files / "model"))


@pytest.fixture
def data(files: Path) -> TextDataModule:
    paths = {"train_file": str(files / "train.csv"), "cache_dir": str(files / "cache")}
    return TextDataModule(str(files / "model"), **paths, max_length=32, split={"folds": 2})  # type: ignore[arg-type]


def test_the_prediction_is_that_of_the_command_line(
    run: Callable[..., tuple[int, str, str]], files: Path, model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "run_dir": str(tmp_path / "study"),
        "model": {"name_or_path": str(files / "model")},
        "data": {
            **{"train_file": str(files / "train.csv"), "cache_dir": str(files / "cache")},
            **{"max_length": 32, "split": {"folds": 2}},
        },
        "trainer": {**FAST, "max_epochs": 2},
        "hpo": {
            "n_trials": 40,
            "space": {
                "model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                "data.batch_size": {"choices": [4, 8]},
            },
            "seed_replicates": 1,
        },
        "given": GIVEN,
        "deadline": 0.01,
        "json": str(tmp_path / "plan.json"),
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    status, out, err = run("plan", "-c", str(tmp_path / "options.yaml"))
    assert status == 0, err
    found = plan(
        *(model, data, SPACE),
        config={"given": GIVEN, "deadline": 0.01},
        run_dir=tmp_path / "study",
        **{"n_trials": 40, "max_epochs": 2, "trainer": FAST, "seed_replicates": 1},  # type: ignore[arg-type]
    )
    assert str(found) in out
    command, python = json.loads((tmp_path / "plan.json").read_text()), json.loads(json.dumps(found.as_dict()))
    assert command["options"].pop("json") != python["options"].pop("json")
    del command["schema_version"]
    assert command == python
    assert not (tmp_path / "study").exists()


def test_a_measurement_leaves_the_templates_and_the_disk_as_they_were(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    at = memory_location()
    write_text(at / "oof" / "99.safetensors", "of the planned study, which is going on")
    options: dict[str, Any] = {"n_trials": 4, "trainer": FAST, "files": str(at)}
    found = plan(model, data, SPACE, config={"seconds": 1.0}, run_dir=tmp_path / "study", **options)
    assert file_sizes(at).keys() == {"oof/99.safetensors"}
    assert found.calibration.took > 0
    assert found.prediction.low <= found.prediction.mid <= found.prediction.high
    assert model.net is None
    assert data.schema is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_trials": 0}, "^n_trials: expected 1 or more, got 0"),
        ({"trials": 3}, "^there is no argument trials; further options of a study are baseline, calibration, compile"),
        ({"config": {"workers": 0}}, "^workers: expected a number above 0"),
        ({"config": {"hours": 3}}, "^config has no key hours; its keys are workers"),
        ({"config": {"given": {"step": 3}}}, "^config.given has no key step; its keys are step_ms"),
        ({"config": {"given": {"step_ms": 0}}}, r"^given\.step_ms: expected a number above 0"),
        ({"space": {"model.rate": FloatDistribution(0, 1)}}, "^space: there is no option model.rate"),
    ],
)
def test_mistakes_name_the_argument(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    arguments: dict[str, Any] = {"config": {"given": GIVEN}, "space": SPACE, "trainer": FAST, **changes}
    with pytest.raises(ConfigError, match=says) as caught:
        plan(model, data, arguments.pop("space"), run_dir=tmp_path / "study", **arguments)
    assert "hpo." not in str(caught.value)


def test_the_package_root_exports_the_function() -> None:
    import lightning_bge
    import lightning_bge.advisor.plan.plan

    assert lightning_bge.plan is plan
