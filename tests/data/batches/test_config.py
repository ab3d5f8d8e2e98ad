from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.errors import ConfigError


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"max_tokens": 0}, "must be auto or a whole number from 1 up, got 0"),
        ({"max_tokens": "much"}, "must be auto or a whole number from 1 up, got 'much'"),
        ({"max_tokens": True}, "must be auto or a whole number from 1 up, got True"),
        ({"eval_max_tokens": 1.5}, "must be auto or a whole number from 1 up, got 1.5"),
        ({"num_workers": -1}, "must be a whole number from 0 up, got -1"),
        ({"num_workers": "auto"}, "must be a whole number from 0 up, got 'auto'"),
        ({"num_workers": None}, "must be a whole number from 0 up, got None"),
        ({"seed": -1}, "must be a whole number from 0 up, got -1"),
        ({"multiprocessing_context": "thread"}, "must be unset or one of .*, got 'thread'"),
    ],
)
def test_wrong_values_are_refused(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.batching\.{next(iter(bad))} {expected}"):
        BatchingConfig(**bad)


def test_evaluation_takes_twice_the_tokens_unless_it_is_set() -> None:
    assert BatchingConfig().eval_limit(100) == 200
    assert BatchingConfig(eval_max_tokens=30).eval_limit(100) == 30


def test_numbers_from_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data.batching", type=BatchingConfig)

    def read(name: str, value: str) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(f"data:\n  batching:\n    {name}: {value}\n")
        return getattr(parser.instantiate(parser.parse_args(["--config", str(path)])).data.batching, name)

    assert read("max_tokens", "auto") == "auto"
    assert read("max_tokens", "300") == 300
    assert read("num_workers", "3") == 3
    with pytest.raises(ArgumentError, match="num_workers"):
        read("num_workers", "auto")
    with pytest.raises(ConfigError, match="got -1"):
        read("num_workers", "-1")
