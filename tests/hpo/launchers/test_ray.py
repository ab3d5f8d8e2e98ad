"""Workers on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.cli.main import main
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.config import RayConfig
from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.url import PASSWORD
from lightning_bge.hpo.trials import attempts, ended_parameter_sets, key_of
from tests.helpers.paths import ROOT
from tests.helpers.postgres import SECRET, Postgres

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:ray")]
ray = pytest.importorskip("ray", reason="make test-slow installs it")

SECONDS = 240.0  # in which what is waited for has to come


class Cluster:
    """A cluster in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ray_cluster"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert self._process.stdout is not None
        self.address, self.session = self._process.stdout.readline().split()

    def toggle_second_node(self) -> None:
        """Kill the second node, or start it again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "done"

    def stop(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    yield found
    ray.shutdown()
    found.stop()


@pytest.fixture(scope="module")
def launchers() -> ModuleType:
    from lightning_bge.hpo.launchers import ray as module

    return module


def wait_until(is_so: Callable[[], Any]) -> Any:
    """Wait until something is true; returns it."""
    until = time.monotonic() + SECONDS
    while not (found := is_so()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.2)
    return found


# ---------------------------------------------------------------------- a study


def test_a_study_survives_the_death_of_a_node_and_shows_its_password_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    main(["sample", str(tmp_path / "S")])
    with Postgres() as server:
        environment = {**os.environ, PASSWORD: SECRET, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "lightning_bge.cli", "hpo", "-c", str(ROOT / "configs/quickstart.yaml")]
        command += ["--model.name_or_path", "S/model", "--data.train_file", "S/train.csv", "--data.cache_dir", "cache"]
        command += ["--data.test_file", "S/test.csv", "--run_dir", "study", "--hpo.n_trials", "8"]
        command += ["--hpo.storage", server.url, "--hpo.worker_timeout", "10", "--launcher", "ray"]
        command += ["--ray.address", cluster.address]
        with (tmp_path / "printed").open("w") as printed:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=printed, stderr=printed)
        os.environ[PASSWORD] = SECRET
        try:
            place = open_study_storage(tmp_path / "study", server.url, "study")
        finally:
            del os.environ[PASSWORD]

        def trials() -> list[FrozenTrial]:
            if not any(study.study_name == "study" for study in place.storage.get_all_studies()):
                return []
            return optuna.load_study(study_name="study", storage=place.storage).get_trials(deepcopy=False)

        def both_train() -> bool:
            running = [one for one in trials() if one.state == TrialState.RUNNING]
            return len({one.user_attrs["worker"]["id"] for one in running}) == 2

        wait_until(lambda: both_train() or process.poll() is not None)
        cluster.toggle_second_node()
        begun = len(trials())
        assert process.wait(SECONDS) == 0, (tmp_path / "printed").read_text()
        found = trials()
    shown = (tmp_path / "printed").read_text()
    assert "2 workers on a Ray cluster of 2 nodes, each with 1 CPU" in shown
    assert begun < len(found)
    sets = attempts(found)
    assert len(sets) == ended_parameter_sets(found) == 8
    assert len({key_of(tries[0].params) for tries in sets.values()}) == 8
    assert {"summary.json", "model", "report.html"} <= {path.name for path in (tmp_path / "study").iterdir()}
    session = Path(cluster.session)
    files = [path for folder in (tmp_path, session) for path in folder.rglob("*") if path.is_file()]
    assert any(path.is_relative_to(session) for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    cluster.toggle_second_node()


# ---------------------------------------------------------------------- where workers run


def launcher(launchers: ModuleType, cluster: Cluster, workers: int | None = None, **options: Any) -> Any:
    """A launcher on the cluster."""
    return launchers.RayLauncher(RayConfig(address=cluster.address, **options), StudyConfig(workers=workers))


def made_run(folder: Path) -> Path:
    """A run folder without a study."""
    folder.mkdir()
    for name in ("config.yaml", "run.json"):
        (folder / name).write_text("{}")
    return folder


def node_of(label: str) -> str:
    [found] = [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["Labels"].get("place") == label]
    return str(found)


def test_a_run_folder_that_a_node_does_not_see(launchers: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    worker = launcher(launchers, cluster).start(made_run(tmp_path / "run"), 0, None)
    assert wait_until(worker.poll) == 2  # there is no journal
    assert f"{tmp_path / 'run'} is not on the node" in worker.output()
    assert "Set run_dir to a folder that all nodes of the Ray cluster mount, or hpo.storage" in worker.output()
    worker.kill()


def test_labels_and_resources_choose_the_node(launchers: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    for place in ("first", "second"):
        one = launcher(launchers, cluster, workers=1, label_selector={"place": place}).start(run, 0, None)
        assert ray.get(one.placed, timeout=SECONDS) == node_of(place)
        one.kill()
    one = launcher(launchers, cluster, resources={"scratch": 1}).start(run, 0, None)
    assert ray.get(one.placed, timeout=SECONDS) == node_of("second")
    one.kill()
    with pytest.raises(ConfigError, match=r"hpo.workers: expected a number with ray.label_selector"):
        launcher(launchers, cluster, label_selector={"place": "first"})


def test_as_many_workers_as_the_nodes_have_room_for(launchers: ModuleType, cluster: Cluster) -> None:
    assert launcher(launchers, cluster).n_workers == 2
    assert launcher(launchers, cluster, num_cpus=0.5).n_workers == 4
    assert launcher(launchers, cluster, resources={"scratch": 1}).n_workers == 1
    more = launcher(launchers, cluster, workers=3)
    assert "The nodes have room for 2 of them: the others wait for more nodes" in more.describe(Path("run"))
    none = launcher(launchers, cluster, num_gpus=0.5)
    assert none.n_workers == 1
    assert "each with 1 CPU, 0.5 GPU" in none.describe(Path("run"))
    assert "room for 0 of them" in none.describe(Path("run"))


def test_the_share_of_a_gpu_is_that_of_its_memory(launchers: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    one = launcher(launchers, cluster, num_gpus=0.3).start(made_run(tmp_path / "run"), 0, None)
    assert one.order.share == 3
    assert one.poll() is None  # no node has a GPU: it waits
    one.terminate()
    assert wait_until(one.poll) == -1


def processes_of(run: Path) -> set[int]:
    """The workers' processes of a run."""
    found = psutil.process_iter(["cmdline"])
    return {one.pid for one in found if {"worker", str(run)} <= set(one.info["cmdline"] or ())}


def kill_the_actor_of(processes: set[int]) -> None:
    """Kill the parent of a worker's process. (`ray.kill` ends the worker first, which is the death of a worker.)"""
    [process] = processes
    parent = psutil.Process(process).parent()
    assert parent is not None
    parent.kill()


def test_an_actor_that_dies_is_started_again_by_ray(launchers: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / "journal.log").touch()
    one = launcher(launchers, cluster).start(run, 0, None)
    first = wait_until(lambda: processes_of(run))
    kill_the_actor_of(first)
    wait_until(lambda: processes_of(run) - first)
    assert one.poll() is None
    assert wait_until(one.poll) == 2  # this is no run
    assert "lightning-bge: " in one.output()
    one.kill()
    wait_until(lambda: not processes_of(run))


def test_an_actor_that_is_killed_too_often_has_ended(launchers: ModuleType, cluster: Cluster, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / "journal.log").touch()
    one = launcher(launchers, cluster, max_restarts=0).start(run, 0, None)
    kill_the_actor_of(wait_until(lambda: processes_of(run)))
    assert wait_until(one.poll) == -1
    assert "actor" in one.output()
    one.kill()


def test_something_else_at_the_address_is_found_in_seconds(
    launchers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TimeoutError, match="what listens there has not answered Ray for 3 s"):
            launchers._check_answers(address)


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    script = "from lightning_bge.cli.main import main; main(['sample', 'runs/sample']); main({})"
    for address, reason in (("127.0.0.1:1", "Connection refused"), ("nonsense", "Invalid address format")):
        arguments = ["hpo", "-c", str(ROOT / "configs/quickstart.yaml"), "--launcher", "ray", "--ray.address", address]
        done = subprocess.run(
            [sys.executable, "-c", script.format(arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"lightning-bge: ray.address: no Ray cluster answers at {address} (")
        assert reason in line
        assert "Start one with `ray start --head`, or set ray.address to the host:port of one that runs" in line
        assert not (tmp_path / "runs" / "quickstart").exists()
