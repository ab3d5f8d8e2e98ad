from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.nested_config import as_config, as_plain


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)
    folder: Path = Path("x")


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate must be at least 0, got {self.rate}")


def test_a_dict_becomes_the_config_and_a_config_stays() -> None:
    config = Outer(0.1)
    assert as_config(Outer, config, "outer") is config
    assert as_config(Outer, {"rate": 0.1}, "outer") == config
    assert as_config(Outer, {}, "outer") == Outer()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"speed": 1, 3: 4}, "^outer has no key speed, 3; its keys are rate, inner$"),
        (0.5, "^outer must be a Outer or a dict of its fields, got 0.5$"),
        ({"rate": "much"}, "^outer: a value has the wrong type .*, got {'rate': 'much'}$"),
        ({"rate": -1}, "^rate must be at least 0, got -1$"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_config(Outer, value, "outer")


def test_plain_data_of_nested_configs() -> None:
    assert as_plain(Outer()) == {"rate": 0.5, "inner": {"names": ["a"], "folder": "x"}}
    assert as_plain({"a": (1, None)}) == {"a": [1, None]}
