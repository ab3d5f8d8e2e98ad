"""Classes that YAML names by their path: `class_path` and `init_args`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, Protocol

from lightning_bge.errors import ConfigError

FIELDS = ("class_path", "init_args")


class ClassOption(Protocol):
    """A config of which one choice is a class of the user's own."""

    @property
    def class_path(self) -> str | None:
        """The path of the class; None: there is none."""

    @property
    def init_args(self) -> dict[str, Any]:
        """Arguments of the class."""


def check_class_option(config: ClassOption, option: str, kept: Collection[str] = ()) -> None:
    """Refuse what has no effect: other options beside `class_path`, and `init_args` without it. Nothing is imported.

    Args:
        config: a dataclass.
        option: its dotted name.
        kept: fields that are in effect beside `class_path`.

    Raises:
        ConfigError: names the option that has no effect, and where its value belongs.
    """
    if not isinstance(config.init_args, Mapping) or not all(isinstance(name, str) for name in config.init_args):
        raise ConfigError(f"{option}.init_args: expected names and values, got {config.init_args!r}")
    if config.class_path is None:
        if config.init_args:
            raise ConfigError(
                f"{option}.init_args: expected nothing without {option}.class_path, got {dict(config.init_args)}"
            )
        return
    for field in fields(config):  # type: ignore[arg-type]
        default, value = field.default, getattr(config, field.name)
        if field.name not in (*FIELDS, *kept) and default is not MISSING and value != default:
            raise ConfigError(
                f"{option}.{field.name}: has no effect beside {option}.class_path: expected its default, "
                f"{'null' if default is None else default}, got {value}. Give {config.class_path} what it needs under "
                f"{option}.init_args"
            )


_named: set[str] = set()


def allow_class(path: str) -> None:
    """Let checkpoints and exported models of this process name a class, such as `my_project.TwoLayers`.

    Importing its module, and making it with the arguments of a checkpoint, runs code.
    """
    _named.add(path)


def find_class(path: str, base: type, expected: str, *, imports: bool = True) -> Any:
    """The class at a path such as `torch.optim.SGD`.

    Args:
        path: module and name.
        base: what it has to inherit from.
        expected: begins error messages: the option, and that the path of such a class was expected.
        imports: whether the path comes from the user, whose program runs it anyway. False, for one that comes from a
            checkpoint, which someone else may have written, and whose arguments too: only classes of `torch.nn` and
            `torch.optim`, and those that the user has named in this process, here or by `allow_class`.

    Raises:
        ConfigError: there is no such class, it does not inherit from `base`, or a checkpoint names it alone.
    """
    module, _, name = path.rpartition(".")
    if not imports and path not in _named and not path.startswith(("torch.nn.", "torch.optim.")):
        raise ConfigError(
            f"{expected}: {path} comes from a checkpoint, and nothing is imported or made that a checkpoint alone "
            f"names, as that runs code. If you trust it, call `lightning_bge.models.allow_class('{path}')` before, or "
            "name it in your options"
        )
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{expected}, got {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{expected}, got {path}")
    if imports:
        allow_class(path)
    return found


def parameters_of(kind: Any) -> Mapping[str, inspect.Parameter]:
    """The named arguments of a class's constructor."""
    return inspect.signature(kind).parameters
