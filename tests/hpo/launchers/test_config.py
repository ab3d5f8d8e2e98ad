"""The options of workers on a Ray cluster."""

import sys
from typing import Any

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.config import RayConfig
from lightning_bge.hpo.launchers.ray import RayLauncher


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"num_cpus": -1}, "ray.num_cpus: expected 0 or more, got -1"),
        ({"num_gpus": float("inf")}, "ray.num_gpus: expected 0 or more"),
        ({"num_gpus": 2}, "ray.num_gpus: expected at most 1, as a trial trains on one device, got 2"),
        ({"resources": {"scratch": 0}}, "ray.resources.scratch: expected more than 0, got 0"),
        ({"max_restarts": -2}, "ray.max_restarts: expected -1 or more, got -2"),
    ],
)
def test_bad_values(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RayConfig(**bad)


def test_a_worker_asks_for_a_gpu_where_the_cluster_has_some() -> None:
    assert RayConfig().demand({"CPU": 8}) == {"CPU": 1}
    assert RayConfig().demand({"CPU": 8, "GPU": 2}) == {"CPU": 1, "GPU": 1}
    config = RayConfig(num_cpus=0, num_gpus=0.25, resources={"scratch": 1})
    assert config.demand({"CPU": 8}) == {"GPU": 0.25, "scratch": 1}
    assert RayConfig(num_gpus=0).demand({"GPU": 2}) == {"CPU": 1}


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--launcher ray needs a package: run `pip install 'lightning-bge\[ray\]'`"):
        RayLauncher(RayConfig(), StudyConfig())
