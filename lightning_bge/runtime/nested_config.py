"""Config dataclasses as arguments of a constructor: given as a dict, and turned back into plain data."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_bge.errors import ConfigError

T = TypeVar("T")


def as_config(kind: type[T], value: T | Mapping[str, Any], argument: str) -> T:
    """A config of a dataclass, where the caller may have passed a dict of its fields.

    Args:
        kind: the dataclass.
        value: an instance, or a mapping from some of its field names to their values; the others get their defaults.
        argument: the constructor's argument, for error messages.

    Raises:
        ConfigError: `value` is something else, or has an unknown key or a value that the config refuses.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{argument} must be a {kind.__name__} or a dict of its fields, got {value!r}")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise ConfigError(f"{argument} has no key {', '.join(unknown)}; its keys are {', '.join(known)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise ConfigError(f"{argument}: a value has the wrong type ({error}), got {dict(value)}") from error


def as_plain(value: Any) -> Any:
    """Dataclasses as dicts, sequences as lists, paths as strings: what YAML, JSON and checkpoints hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
