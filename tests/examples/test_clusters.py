"""The files for clusters are run as they stand: the tasks of the job array by bash, the containers as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.url import PASSWORD, PASSWORD_FILE
from lightning_bge.hpo.trials import attempts, ended_parameter_sets, key_of
from tests.helpers.array_task import ARRAY, SCRIPT, Cluster, write_program
from tests.helpers.cli_sample import write_sample_with_model
from tests.helpers.container import command_of, container, environment_of, read_job
from tests.helpers.paths import CONFIGS, ROOT
from tests.helpers.postgres import SECRET, Postgres

STUDY = f"study-{ARRAY}"
# what `man sbatch` has
SBATCH_OPTIONS = {"job-name", "array", "ntasks", "gres", "cpus-per-task", "mem", "time", "output", "open-mode"}
SBATCH_OPTIONS |= {"requeue", "signal"}


# ---------------------------------------------------------------------- the job array, without a study


def test_the_script_is_bash_and_its_options_are_those_of_sbatch() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found = [line for line in lines if line.startswith("#SBATCH")]
    assert found == [line for line in lines[:code] if line.startswith("#SBATCH")]  # Slurm reads no further
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in found]
    assert {match[1] for match in options if match is not None} == SBATCH_OPTIONS
    assert len(found) == len(SBATCH_OPTIONS)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes, each the first one of a group, which are killed at the end where they still run."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def program(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> Cluster:
    """A cluster whose `lightning-bge` writes its arguments and environment, and waits for a signal or the file `go`."""
    found = Cluster(tmp_path, started)
    text = f"""cd {tmp_path}
printf '%s\\n' "$@" > arguments
env > environment
trap 'exit ${{ON_TERM:-143}}' TERM
touch ready
until [ -e go ]; do sleep 0.05; done
exit $(cat go)"""
    write_program(tmp_path / "bin" / "lightning-bge", text)
    return found


def wait_until_ready(folder: Path, process: subprocess.Popen[bytes]) -> None:
    while not (folder / "ready").exists():
        assert process.poll() is None
        subprocess.run(["sleep", "0.05"], check=True)


@pytest.mark.parametrize(
    ("sent", "on_term", "status", "requeued"),
    [
        (signal.SIGUSR1, "143", 143, [f"requeue {ARRAY}_0"]),  # the time limit
        (signal.SIGUSR1, "0", 0, []),  # the study had just ended
        (signal.SIGUSR1, "2", 2, []),
        (signal.SIGTERM, "143", 143, []),  # scancel
    ],
)
def test_a_signal_is_handed_on_and_only_the_time_limit_queues_the_task_again(
    program: Cluster, sent: signal.Signals, on_term: str, status: int, requeued: list[str]
) -> None:
    program.variables = {"ON_TERM": on_term}
    process = program.start(0)
    wait_until_ready(program.folder, process)
    process.send_signal(sent)
    assert process.wait(30) == status
    assert program.requeued() == requeued


@pytest.mark.parametrize("status", [0, 2])
def test_the_status_of_a_task_is_that_of_its_process(program: Cluster, status: int) -> None:
    (program.folder / "go").write_text(str(status))
    assert program.start(0).wait(30) == status
    assert program.requeued() == []


def test_the_study_has_one_name_and_one_place_in_all_tasks(program: Cluster) -> None:
    (program.folder / "go").write_text("0")
    calls = set()
    for task in (0, 1):
        assert program.start(task, "--hpo.n_trials", "5").wait(30) == 0
        calls.add((program.folder / "arguments").read_text())
    [call] = calls
    assert (
        call.split()
        == (
            f"hpo -c hpo.yaml --hpo.study_name {STUDY} --hpo.workers 1 "
            f"--run_dir {program.folder}/studies/{STUDY} --hpo.n_trials 5"
        ).split()
    )
    environment = (program.folder / "environment").read_text().splitlines()
    assert {"IN_VENV=yes", "OMP_NUM_THREADS=1"} <= {*environment}


def test_with_a_database_each_task_has_a_run_folder_of_its_own(program: Cluster) -> None:
    (program.folder / "go").write_text("0")
    program.variables = {"STORAGE": "postgresql+psycopg://me@db/studies", "STUDY": "sick"}
    folders, password = set(), program.folder / ".lightning-bge-password"
    password.write_text("secret")
    for task in (0, 1):
        assert program.start(task).wait(30) == 0
        call = (program.folder / "arguments").read_text().split()
        assert call[call.index("--hpo.files") + 1] == f"{program.folder}/studies/sick"
        folders.add(call[call.index("--run_dir") + 1])
        assert f"{PASSWORD_FILE}={password}\n" in (program.folder / "environment").read_text()
    assert len(folders) == 2
    assert not any(Path(folder).exists() for folder in folders)


def test_a_password_that_is_given_in_another_way_is_the_one_that_counts(program: Cluster) -> None:
    (program.folder / "go").write_text("0")
    program.variables = {"STORAGE": "postgresql+psycopg://me@db/studies", "STUDY": "sick"}
    assert program.start(0).wait(30) == 0  # there is no file: libpq may know the password
    assert PASSWORD_FILE not in (program.folder / "environment").read_text()
    (program.folder / ".lightning-bge-password").write_text("secret")
    program.variables |= {PASSWORD: "other"}
    assert program.start(0).wait(30) == 0
    assert PASSWORD_FILE not in (program.folder / "environment").read_text()


# ---------------------------------------------------------------------- the Job, without a study


def test_the_job_is_what_the_api_of_kubernetes_expects() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make test-slow installs it")
    for version in ("1.29", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(read_job(), version, strict=True)


def test_the_parts_of_the_job_fit_together() -> None:
    spec = read_job()["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"  # of which backoffLimitPerIndex is a part
    assert spec["parallelism"] == spec["completions"]
    assert pod["restartPolicy"] == "Never"  # else a podFailurePolicy is refused
    [by_status] = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert by_status == {"containerName": container()["name"], "operator": "In", "values": [128 + signal.SIGTERM]}
    assert {one["name"] for one in container()["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_password_is_in_a_mounted_secret() -> None:
    [secret] = [volume for volume in read_job()["spec"]["template"]["spec"]["volumes"] if "secret" in volume]
    [mount] = [one for one in container()["volumeMounts"] if one["name"] == secret["name"]]
    [file] = [one["value"] for one in container()["env"] if one["name"] == PASSWORD_FILE]
    assert Path(file).parent == Path(mount["mountPath"])
    assert PASSWORD not in {one["name"] for one in container()["env"]}


# ---------------------------------------------------------------------- studies


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_with_model(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="make test-slow installs it")
    with Postgres() as found:
        yield found


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, SECRET)


def option(command: Sequence[str], name: str) -> str:
    """The value of one of the study's options in a command."""
    return command[command.index(f"--hpo.{name}") + 1]


def write_program_and_config(sample: Path, folder: Path, n_trials: int) -> dict[str, str]:
    """Write what a user has: the program, and `hpo.yaml` with a search whose trials train when there is a file `go`.

    Returns:
        The variables that the program needs.
    """
    options = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    del options["run_dir"]
    options["model"]["name_or_path"] = str(sample / "model")
    options["data"] |= {"train_file": str(sample / "train.csv"), "test_file": str(sample / "test.csv")}
    options["data"]["split"] = {"folds": 2}
    wait = {"class_path": "tests.helpers.wait_for_file.WaitForFile", "init_args": {"path": str(folder / "go")}}
    options["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "callbacks": [wait]}
    options["hpo"] |= {"n_trials": n_trials, "baseline": False}
    (folder / "hpo.yaml").write_text(yaml.safe_dump(options))
    write_program(folder / "bin" / "lightning-bge", f'exec {sys.executable} -m lightning_bge.cli "$@"')
    return {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


@dataclass
class Watched:
    """A study while its processes run: where it is kept, and what they print."""

    place: Path
    storage: str | None
    name: str
    logs: Sequence[Path]

    def trials(self) -> list[FrozenTrial]:
        """The trials so far."""
        if self.storage is None and not (self.place / "journal.log").exists():
            return []
        storage = open_study_storage(self.place, self.storage, self.name).storage
        try:
            return optuna.load_study(study_name=self.name, storage=storage).get_trials(deepcopy=False)
        except KeyError:  # no process has created it yet
            return []

    def printed(self) -> str:
        """What all processes have printed."""
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for_trials(self, number: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Wait until so many trials have begun; fail where a process ends before, or after two minutes."""
        until = time.monotonic() + 120
        while len(self.trials()) < number:
            assert [process.poll() for process in processes] == [None] * len(processes), self.printed()
            assert time.monotonic() < until, self.printed()
            time.sleep(0.2)

    def wait_for_stop(self) -> None:
        """Wait until a process has got the signal; fail after two minutes."""
        until = time.monotonic() + 120
        while "SIGTERM: saving" not in self.printed():
            assert time.monotonic() < until, self.printed()
            time.sleep(0.1)

    def check(self, n_trials: int) -> None:
        """Each parameter set has ended, none was tried twice, and one was stopped and continued."""
        trials = self.trials()
        sets = attempts(trials)
        assert len(sets) == ended_parameter_sets(trials) == n_trials
        assert len({key_of(tries[0].params) for tries in sets.values()}) == n_trials
        assert not any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials)
        [stopped] = [trial for trial in trials if "interrupted" in trial.user_attrs]
        assert [trial.user_attrs.get("retry_of") for trial in trials].count(stopped.number) == 1
        assert SECRET not in self.printed()


def check_results(results: Path, n_trials: int) -> None:
    """The results are in a folder, with one model."""
    summary = json.loads((results / "summary.json").read_text())
    assert summary["n_complete"] + summary["n_pruned"] == n_trials
    assert [*results.rglob("model.safetensors")] == [results / "model" / "model.safetensors"]
    for name in ("report.html", "best.yaml", "trials.csv", "oof.csv", "test.csv", "config.yaml"):
        assert (results / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "database"])
def test_the_tasks_of_the_array_share_a_study(
    storage: str,
    sample: Path,
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
    request: pytest.FixtureRequest,
) -> None:
    variables = write_program_and_config(sample, tmp_path, 3)
    url = None if storage == "journal" else request.getfixturevalue("server").url
    (tmp_path / ".lightning-bge-password").write_text(SECRET)
    cluster = Cluster(tmp_path, started, variables if url is None else {**variables, "STORAGE": url})
    results = tmp_path / "studies" / STUDY
    study = Watched(results, url, STUDY, [cluster.log(0), cluster.log(1)])
    tasks = [cluster.start(0), cluster.start(1)]
    study.wait_for_trials(2, tasks)
    tasks[0].send_signal(signal.SIGUSR1)
    study.wait_for_stop()
    (tmp_path / "go").touch()
    assert tasks[0].wait(240) == 143, study.printed()
    assert cluster.requeued() == [f"requeue {ARRAY}_0"]
    tasks[0] = cluster.start(0)  # as Slurm does, also when the others have ended the study meanwhile
    assert [task.wait(240) for task in tasks] == [0, 0], study.printed()
    study.check(3)
    check_results(results, 3)
    assert [*(tmp_path / "tmp").glob("tmp.*")] == []  # the run folders of the tasks


@pytest.mark.slow
def test_the_pods_of_the_job_share_a_study(
    sample: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]], server: Postgres
) -> None:
    variables = write_program_and_config(sample, tmp_path, 3)
    write_program(tmp_path / "bin" / "srun", "exit 1")  # where it is, Lightning recommends it
    (tmp_path / "password").write_text(SECRET)
    shared = {"/etc/study": tmp_path, "/run/secrets/studies": tmp_path, "/shared": tmp_path / "shared"}
    command = command_of(shared)
    place, name = Path(option(command, "files")), option(command, "study_name")
    study = Watched(place, server.url, name, [tmp_path / f"{index}.log" for index in range(2)])

    def start(index: int, pod: str) -> subprocess.Popen[bytes]:
        folders = {**shared, "/tmp": tmp_path / pod}
        folders["/tmp"].mkdir()
        call = command_of(folders)
        call[call.index("--hpo.storage") + 1] = server.url
        environment = environment_of(index, folders) | variables
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
        with study.logs[index].open("ab") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log, "process_group": 0}
            started.append(subprocess.Popen(call, env=environment, cwd=folders["/tmp"], **options))
        return started[-1]

    pods = [start(0, "a"), start(1, "b")]
    study.wait_for_trials(2, pods)
    pods[0].send_signal(signal.SIGTERM)
    study.wait_for_stop()
    (tmp_path / "go").touch()
    assert pods[0].wait(240) == 143, study.printed()
    assert pods[1].wait(240) == 0, study.printed()
    assert start(0, "c").wait(240) == 0, study.printed()  # as the Job does, here after the end of the study
    study.check(3)
    check_results(place, 3)
    assert "srun" not in study.printed()
    assert f"{place}/ has copies" in study.printed()
