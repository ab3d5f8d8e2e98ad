"""Studies in a real PostgreSQL, directly and through Optuna's gRPC proxy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from lightning_bge.cli.main import main
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import StudyError, UserError
from lightning_bge.hpo.storage.database import check_answers
from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.url import PASSWORD, parse_storage
from lightning_bge.hpo.trials import attempts, ended_parameter_sets, key_of
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.port import free_port
from lightning_bge.tuning import tune
from tests.helpers.paths import ROOT
from tests.helpers.postgres import SECRET, Postgres

pytestmark = pytest.mark.slow
pytest.importorskip("psycopg", reason="make test-slow installs it")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as found:
        yield found


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, SECRET)


@pytest.fixture(scope="module")
def proxy(server: Postgres) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "lightning_bge.cli", "proxy", server.url, "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, PASSWORD: SECRET}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving")
    open_study_storage(Path("run"), f"grpc://localhost:{port}", waits=True)  # until it listens
    yield f"grpc://localhost:{port}"
    process.stdout.close()
    process.terminate()
    process.wait(30)


def run_processes(place: Path, number: int, **options: Any) -> list[optuna.trial.FrozenTrial]:
    """Run a study without training in several processes, each with a run folder of its own; returns its trials."""
    config = {"n_trials": 24, "pruner": {"name": "asha"}, **options}
    running = []
    for one in range(number):
        command = [sys.executable, "-m", "tests.helpers.fake_study", str(place / str(one)), json.dumps(config)]
        running.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate("go\n", timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * number
    made = [int(output.splitlines()[-1]) for output in outputs]
    found = open_study_storage(place, options["storage"], options["study_name"])
    trials = optuna.load_study(study_name=options["study_name"], storage=found.storage).get_trials(deepcopy=False)
    assert sum(made) == len(trials)
    assert found.workers.living() == set()
    return trials


@pytest.mark.parametrize("through", ["database", "proxy"])
def test_processes_share_a_study(through: str, server: Postgres, proxy: str, tmp_path: Path) -> None:
    storage = server.url if through == "database" else proxy
    trials = run_processes(tmp_path, 3, storage=storage, study_name=f"shared-{through}")
    sets = attempts(trials)
    assert len(sets) == ended_parameter_sets(trials) == 24
    assert len({key_of(tries[0].params) for tries in sets.values()}) == 24
    # those of this process; the others have left none
    assert int(server.query("select count(*) from pg_stat_activity where application_name = 'lightning-bge'")) < 8


# ---------------------------------------------------------------------- what users are told


def refused(url: str) -> str:
    """The one message that both the check before a run and the opening give."""
    messages = set()
    for call in (lambda: check_answers(parse_storage(url)), lambda: open_study_storage(Path("run"), url)):
        with pytest.raises(UserError) as found:
            call()
        messages.add(str(found.value))
    [message] = messages
    assert SECRET not in message
    assert len(message.splitlines()) == 1
    return message


def test_a_database_that_is_down(server: Postgres) -> None:
    url = server.url.replace(str(server.port), str(free_port()))
    assert "does not answer: connection" in refused(url)
    assert "Start the database, or correct host, port and parameters" in refused(url)


def test_the_program_says_that_the_database_is_down(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["sample", "S"])
    capsys.readouterr()
    url = server.url.replace(str(server.port), str(free_port()))
    files = ["--model.name_or_path", "S/model", "--data.train_file", "S/train.csv", "--data.test_file", "S/test.csv"]
    with pytest.raises(SystemExit) as ended:
        main(["hpo", "-c", str(ROOT / "configs/quickstart.yaml"), *files, "--run_dir", "R", "--hpo.storage", url])
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-bge:")]
    assert "does not answer: connection failed" in line
    assert not Path("R").exists()


def test_the_port_of_the_proxy_is_taken(server: Postgres, proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["proxy", server.url, "--port", proxy.rpartition(":")[2]])
    assert "can't be listened at" in capsys.readouterr().err


def test_a_host_that_does_not_exist(server: Postgres) -> None:
    assert "does not answer" in refused("postgresql+psycopg://me@no-such-host.invalid/studies")


def test_a_password_that_is_refused(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "wrong-one-77")
    message = refused(server.url)
    assert f"refuses the login: connection failed: {server.url.split('@')[0]}" not in message
    assert "refuses the login" in message
    assert f"Set the password in the environment variable {PASSWORD}" in message
    assert "wrong-one-77" not in message


def test_no_password_at_all(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setenv("PGPASSFILE", "/dev/null")
    assert "refuses the login" in refused(server.url)


def test_libpq_reads_its_own_password(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setenv("PGPASSWORD", SECRET)
    check_answers(parse_storage(server.url))


def test_a_user_that_does_not_exist(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refuses the login" in refused(server.url.replace("bge@", "nobody@"))


def test_a_user_who_may_not_create_tables(server: Postgres) -> None:
    url = server.create("guarded").replace("bge@", "guest@")
    server.query(f"create role guest login password '{SECRET}'", "guarded")
    with pytest.raises(StudyError, match=r"permission denied for schema public.*GRANT CREATE, USAGE ON SCHEMA public"):
        open_study_storage(Path("run"), url)


def test_a_database_that_does_not_exist(server: Postgres) -> None:
    assert 'database "other" does not exist. Create the database' in refused(server.url.replace("/studies", "/other"))


@pytest.mark.parametrize(
    ("version", "fix"), [("v2.6.0.a", "optuna storage upgrade --storage"), ("v99.0.0.a", "install that version")]
)
def test_tables_of_another_version(version: str, fix: str, server: Postgres) -> None:
    url = server.create(version)
    open_study_storage(Path("run"), url)
    server.query(f"update alembic_version set version_num = '{version}'", version)
    with pytest.raises(StudyError, match=f"tables .* are those of another version of Optuna.*{fix}"):
        open_study_storage(Path("run"), url)


def test_a_study_of_another_program_is_left_alone(server: Postgres, tmp_path: Path) -> None:
    storage = open_study_storage(tmp_path, server.url, "foreign").storage
    study = optuna.create_study(storage=storage, study_name="foreign")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    options = json.dumps({"storage": server.url, "study_name": "foreign"})
    command = [sys.executable, "-m", "tests.helpers.fake_study", str(tmp_path / "run"), options]
    done = subprocess.run(command, cwd=ROOT, input="go\n", capture_output=True, text=True)
    assert "was not created by `lightning-bge hpo`. Set another hpo.study_name" in done.stderr
    assert len(study.trials) == 1


# ---------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def run(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search with two workers; what it printed is in `printed`, and the processes' arguments in `ps`."""
    place = tmp_path_factory.mktemp("search")
    main(["sample", str(place / "S")])
    environment = {**os.environ, PASSWORD: SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_bge.cli", "hpo", "-c", str(ROOT / "configs/quickstart.yaml")]
    command += ["--model.name_or_path", "S/model", "--data.train_file", "S/train.csv", "--data.test_file", "S/test.csv"]
    command += ["--data.cache_dir", "cache", "--run_dir", "study", "--hpo.workers", "2"]
    command += ["--hpo.storage", server.url, "--hpo.n_trials", "6"]
    with (place / "printed").open("w") as printed, (place / "ps").open("w") as seen:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=printed, stderr=printed)
        while process.poll() is None:
            for one in psutil.Process().children(recursive=True):  # the search, its workers, and the server
                with suppress(psutil.NoSuchProcess):
                    seen.write(" ".join(one.cmdline()) + "\n")
            time.sleep(1.0)
    assert process.returncode == 0, (place / "printed").read_text()
    return place


def test_a_search_in_a_database_writes_what_one_with_a_journal_does(run: Path, server: Postgres) -> None:
    names = {path.name for path in (run / "study").iterdir()}
    assert {"summary.json", "best.yaml", "trials.csv", "oof.csv", "model", "report.html"} <= names
    assert "journal.log" not in names
    assert server.query("select count(*) from studies where study_name = 'study'") == "1"


def test_the_password_is_in_no_file_and_no_list_of_processes(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert " worker " in (run / "ps").read_text()
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_run_folder_that_is_renamed_keeps_its_study(run: Path, server: Postgres) -> None:
    shutil.copytree(run / "study", run / "renamed")
    config = (run / "renamed" / "config.yaml").read_text()
    assert "study_name: study" in config

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lightning_bge.cli", *arguments]
        return subprocess.run(command, cwd=run, capture_output=True, text=True)

    assert "6 of 6 finished" in call("status", "renamed").stdout
    trials = (run / "renamed" / "trials.csv").read_text()
    again = call("hpo", "-c", "renamed/config.yaml", "--hpo.study_name", "null", "--run_dir", "renamed")
    assert again.returncode == 0, again.stderr
    assert (run / "renamed" / "trials.csv").read_text() == trials
    (run / "renamed" / "config.yaml").write_text(config.replace("study_name: study", "study_name: gone"))
    report = (run / "renamed" / "report.html").read_bytes()
    for command in ("status", "report"):
        done = call(command, "renamed")
        assert done.returncode == 2
        assert "renamed: expected the study gone in" in done.stderr
    assert (run / "renamed" / "report.html").read_bytes() == report
    assert server.query("select count(*) from studies where study_name in ('renamed', 'gone')") == "0"


def test_the_password_of_an_error_is_in_no_message(run: Path, server: Postgres) -> None:
    url = server.url.replace("bge@", f"bge:{SECRET}@")
    command = [sys.executable, "-m", "lightning_bge.cli", "hpo", "-c", str(run / "study" / "config.yaml")]
    done = subprocess.run([*command, "--hpo.storage", url], cwd=run, capture_output=True, text=True)
    assert done.returncode == 2
    assert "hpo.storage: expected a URL without a password" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_the_status_is_seen_from_a_machine_without_the_run_folder(
    run: Path, server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["status", "study", "--storage", server.url])
    shown = capsys.readouterr().out
    assert shown.startswith("study study: finished")
    assert "6 of 6 finished" in shown
    main(["status", str(run / "study")])
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]
    with pytest.raises(SystemExit):
        main(["status", "other", "--storage", server.url])
    assert "has no study other" in capsys.readouterr().err


def test_a_finished_search_is_not_repeated_by_the_same_call(run: Path, server: Postgres) -> None:
    count = "select count(*) from trials join studies using (study_id) where study_name ~ '^study(-baseline)?$'"
    before = server.query(count)
    environment = {**os.environ, PASSWORD: SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_bge.cli", "worker", str(run / "study")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert server.query(count) == before


def test_tune_keeps_a_study_in_a_database(run: Path, server: Postgres, tmp_path: Path) -> None:
    files = {"train_file": str(run / "S" / "train.csv"), "cache_dir": str(run / "cache")}
    files |= {"text_columns": ["text", "criterion"], "group_column": "post_id"}
    found = tune(
        BGEClassifier(str(run / "S" / "model")),
        TextDataModule(str(run / "S" / "model"), **files, split={"folds": 2}),  # type: ignore[arg-type]
        {"model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        **{"run_dir": tmp_path / "run", "n_trials": 2, "max_epochs": 1, "refit": False, "baseline": False},
        pruner={"name": "none"},
        trainer={"accelerator": "cpu", "precision": "32-true"},
        storage=server.url,
        study_name="from Python",
    )
    assert (
        server.query("select count(*) from trials join studies using (study_id) where study_name='from Python'") == "2"
    )
    assert found.summary is not None
    assert not (tmp_path / "run" / "journal.log").exists()


# ---------------------------------------------------------------------- kills and outages


def test_searches_survive_kills_a_restart_and_an_outage() -> None:
    """One with the workers of one command, and one as on four machines."""
    command = [sys.executable, "-m", "tests.tools.chaos", "--postgres", "--away", "8"]
    command += ["--runs", "2", "--trials", "14", "--kills", "6", "--aimed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["apart"] for one in found] == [False, True]
    for one in found:
        assert one["faults"] == []
        assert one["kills"]["restart"] == one["kills"]["away"] == 1
