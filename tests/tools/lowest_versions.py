"""Prints a constraints file with the lowest versions that pyproject.toml admits.

python tests/tools/lowest_versions.py [--without torch] > lowest.txt

Packages without a lower bound, and what the packages themselves depend on, are left to pip.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

BOUND = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9A-Za-z.]*)")


def lowest(requirements: list[str], without: list[str]) -> Iterator[str]:
    """`name==version` for each requirement that has a lower bound."""
    for requirement in requirements:
        found = BOUND.match(requirement)
        if found and found[1] not in without:
            yield f"{found[1]}=={found[2]}"


def main() -> None:
    """Read pyproject.toml, print the constraints."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [each for extra in project["optional-dependencies"].values() for each in extra]
    without = sys.argv[2:] if sys.argv[1:2] == ["--without"] else []
    print("\n".join(sorted(set(lowest([*project["dependencies"], *optional], without)))))


if __name__ == "__main__":
    main()
