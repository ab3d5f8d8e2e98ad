"""A container of `examples/clusters/kubernetes/study.yaml`, run as a process of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import EXAMPLES

JOB = EXAMPLES / "clusters" / "kubernetes" / "study.yaml"


def read_job() -> dict[str, Any]:
    """The Job."""
    found = yaml.safe_load(JOB.read_text())
    assert isinstance(found, dict)
    return found


def container() -> dict[str, Any]:
    """Its only container."""
    [found] = read_job()["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def in_folders(text: str, folders: Mapping[str, Path]) -> str:
    """A text of the container in which a path below a mounted volume is one on this machine.

    Args:
        text: an argument, or the value of an environment variable.
        folders: what is mounted, by the path in the container.
    """
    for path, folder in folders.items():
        if text == path or text.startswith(f"{path}/"):
            return str(folder) + text.removeprefix(path)
    return text


def command_of(folders: Mapping[str, Path]) -> list[str]:
    """The command of the container, with its arguments."""
    found = container()
    return [in_folders(text, folders) for text in [*found["command"], *found["args"]]]


def environment_of(index: int, folders: Mapping[str, Path]) -> dict[str, str]:
    """The environment of the container in the pod of an index, with the path of this machine's programs."""
    found = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index), "TMPDIR": str(folders["/tmp"])}
    for variable in container()["env"]:
        if "value" in variable:
            found[variable["name"]] = in_folders(variable["value"], folders)
        else:
            limit = re.fullmatch(r"limits\.(\w+)", variable["valueFrom"]["resourceFieldRef"]["resource"])
            assert limit is not None
            found[variable["name"]] = str(container()["resources"]["limits"][limit[1]])
    return found
