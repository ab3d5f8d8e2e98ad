"""A PostgreSQL server of its own, of Debian's package, for tests and for `tests/tools/chaos.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from lightning_bge.runtime.port import free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # of Debian's packages, the newest last
SECRET = "planted-5f2c-secret"  # the password, which must be found in no file
USER = "bge"


class Postgres:
    """A server on this machine that asks for a password, with an empty database `studies`.

    Args:
        connections: how many it allows.
    """

    def __init__(self, connections: int = 100) -> None:
        self.port, self.connections = free_port(), connections
        # not in a folder that only root can enter: the server does not run as root
        self.folder = Path(tempfile.gettempdir()) / f"postgres-{os.getpid()}-{self.port}"
        self.url = f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/studies"

    def __enter__(self) -> Postgres:
        self.folder.mkdir(parents=True)
        password = self.folder / "password"
        password.write_text(SECRET)
        if os.getuid() == 0:
            for path in (self.folder, password):
                shutil.chown(path, "postgres")
        self._run("initdb", "-D", self._data, "-A", "scram-sha-256", "-U", USER, f"--pwfile={password}")
        self.start()
        self._run("createdb", *self._login, "studies")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)

    @property
    def _login(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER]

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c max_connections={self.connections}"
        self._run("pg_ctl", "-D", self._data, "-l", str(self.folder / "log"), "-o", options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends all connections, `immediate` is a crash."""
        self._run("pg_ctl", "-D", self._data, "-m", mode, "-w", "stop")

    def create(self, database: str) -> str:
        """Create another database; returns its URL."""
        self._run("createdb", *self._login, database)
        return self.url.replace("/studies", f"/{database}")

    def query(self, text: str, database: str = "studies") -> str:
        """What `psql` prints, without alignment."""
        return self._run("psql", *self._login, "-d", database, "-Atc", text)

    def _run(self, program: str, *arguments: str) -> str:
        command = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open in the server
            done = subprocess.run(
                [*command, str(BINARIES[-1] / program), *arguments],
                cwd="/",
                env={**os.environ, "PGPASSWORD": SECRET},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            output.seek(0)
            text = output.read().strip()
        assert done.returncode == 0, text
        return text
