from __future__ import annotations

from tests.tools.lowest_versions import lowest


def test_lower_bounds_become_exact_versions() -> None:
    requirements = [
        "torch>=2.11",
        "lightning>=2.6.6,!=2.6.2,!=2.6.3",
        "jsonargparse[signatures]>=4.49",
        "pytest",
        "x==1",
    ]
    assert list(lowest(requirements, [])) == ["torch==2.11", "lightning==2.6.6", "jsonargparse==4.49"]
    assert list(lowest(requirements, ["torch"])) == ["lightning==2.6.6", "jsonargparse==4.49"]
