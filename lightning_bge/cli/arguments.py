"""Arguments of commands that train nothing, and what is said about an argument that is wrong."""

import difflib
import re
from argparse import ArgumentParser
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.paths import check_path


def check_run(run: Path) -> None:
    """Check the argument RUN of a command that reads a run.

    Raises:
        ConfigError: it is a URL, or can't be a path.
    """
    if re.match(r"[A-Za-z][\w.+-]+:/", str(run)):  # a `Path` has one slash of two
        raise ConfigError(
            "RUN: expected a run's folder, got a URL, which is not repeated here as it may hold a password. Name the "
            "folder; `status` and `dashboard` read a storage with --storage"
        )
    check_path("RUN", run)


def named_values(args: list[str]) -> list[tuple[str, str]]:
    """Name and value of each option that has one, before a parser has read them."""
    found = []
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        if name.startswith("-"):
            found.append((name, value if equals else following))
    return found


class PlainParser(ArgumentParser):
    """argparse's parser, whose errors are one line.

    Raises:
        ConfigError: by `parse_args`, where an argument is wrong.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with the nearest known option in the error of an unknown one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = re.findall(r"--?[\w.]+", self.format_usage())
            raise ConfigError(describe_unknown(unknown, known, self.prog))
        return found

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` in place of printing the usage."""
        raise ConfigError(describe_argument_error(message, self.prog))


def describe_unknown(unknown: list[str], known: Collection[str], prog: str) -> str:
    """One line on arguments that a parser has not used.

    Args:
        unknown: the arguments.
        known: the options that there are.
        prog: the program with its command.
    """
    options = [one.partition("=")[0] for one in unknown if one.startswith("-")]
    if not options:
        return f"expected options, which begin with --, got {unknown[0]!r}. Put a value with blanks into quotes"
    return f"there is no option {options[0]}. {did_you_mean(options[0], known, prog)}"


def nearest(name: str, known: Collection[str], cutoff: float = 0.75) -> str | None:
    """The known name that is meant: one of which it is the beginning or the last part, else the most similar one.

    Args:
        name: an unknown name.
        known: all that there are.
        cutoff: how similar they must be, 0 ... 1.
    """
    whole = [one for one in known if one.startswith(name) or one.endswith(f".{name.lstrip('-')}")]
    near = sorted(whole, key=lambda one: (len(one), one)) or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Collection[str], prog: str) -> str:
    """The remedy for an unknown name."""
    near = nearest(name, known)
    return f"`{prog} --help` lists the options" if near is None else f"Did you mean {near}?"


def describe_argument_error(message: str, prog: str) -> str:
    """One line of argparse's message, with the option first and the remedy last."""
    text = re.sub(r"^argument (\S+?): ", lambda found: f"{found[1].split('/')[-1]}: ", " ".join(message.split()))
    return f"{text}. See `{prog} --help`"
