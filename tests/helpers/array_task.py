"""Tasks of the job array in `examples/clusters/slurm/study.sbatch`, as Slurm would start them on one machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.paths import EXAMPLES

SCRIPT = EXAMPLES / "clusters" / "slurm" / "study.sbatch"
ARRAY = 4200  # the id of the job array


def write_program(path: Path, text: str) -> None:
    """Write a shell script that can be called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@dataclass
class Cluster:
    """The folder of a user who submits the job array.

    `bin` stands for the programs of the nodes, with a `scontrol` that writes what it was asked for to `requeued`.

    Args:
        folder: the folder.
        started: the processes of the tasks are added to it.
        variables: further environment variables of the jobs.
    """

    folder: Path
    started: list[subprocess.Popen[bytes]]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        write_program(programs / "scontrol", f'echo "$@" >> {self.folder}/requeued')
        write_program(self.folder / ".venv" / "bin" / "activate", "export IN_VENV=yes")
        (self.folder / "tmp").mkdir(exist_ok=True)

    def start(self, task: int, *options: str) -> subprocess.Popen[bytes]:
        """Start a task; what it prints is added to its log."""
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "SLURM_ARRAY_JOB_ID": str(ARRAY),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_JOB_ID": str(ARRAY + task),  # one of the tasks has the id of the array
            "SLURM_JOB_NAME": "study",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_NTASKS": "1",  # by this and the next four Lightning knows that Slurm has started it
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            **self.variables,
        }
        with self.log(task).open("ab") as log:
            process = subprocess.Popen(
                ["bash", SCRIPT, *options],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self.started.append(process)
        return process

    def log(self, task: int) -> Path:
        """What a task has printed."""
        return self.folder / f"study-{ARRAY}_{task}.log"

    def requeued(self) -> list[str]:
        """What `scontrol` was asked for."""
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []
