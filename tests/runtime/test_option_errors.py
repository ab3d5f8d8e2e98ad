"""Messages of jsonargparse as it raises them, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

from lightning_bge.runtime.option_errors import describe_option_error


@dataclass
class Options:
    """Options of each kind."""

    count: int = 1
    rate: float | None = None
    name: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    space: dict[str, dict[str, Any]] | None = None
    callbacks: list[Callback] | Callback | None = None


def message(*args: str) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--run", type=Options, default=Options())
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(args)
    return describe_option_error(str(error.value))


STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
IN_CLASS = f"run.callbacks: class_path {STOPPING}"


def stopping(arguments: str) -> list[str]:
    return ["--run.callbacks", f"[{{class_path: {STOPPING}, init_args: {arguments}}}]"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--run.count", "x"], "run.count: expected a whole number, got x"),
        (["--run.count", ""], "run.count: expected a whole number, got nothing"),
        (["--run.rate", "x"], "run.rate: expected a number or null, got x"),
        (["--run.name", "c"], "run.name: expected one of a, b, got c"),
        (["--run.names", "c"], "run.names: expected a list, got c"),
        (["--run.space", "[1]"], "run.space: expected a mapping or null, got [1]"),
        (["--run.callbacks", "[{class_path: no.Such}]"], "run.callbacks: class_path no.Such: No module named 'no'"),
        (
            ["--run.callbacks", "[{class_path: json.JSONDecoder}]"],
            "run.callbacks: expected the class path of a Callback, got json.JSONDecoder",
        ),
        (stopping("{monitor: a, patience: x}"), f"{IN_CLASS}: patience: expected a whole number, got x"),
        (stopping("{foo: x}"), f"{IN_CLASS}: Option 'foo' is not accepted"),
        (["--run", "x"], "run: expected a mapping of options, or a YAML file with one, got x"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_the_option_what_was_expected_and_what_came(args: list[str], line: str) -> None:
    assert message(*args) == line


def test_a_long_value_is_cut() -> None:
    assert len(message("--run.count", "x" * 1000)) < 200


def test_other_messages_are_joined_into_one_line() -> None:
    assert describe_option_error("some\n  other text") == "some other text"
