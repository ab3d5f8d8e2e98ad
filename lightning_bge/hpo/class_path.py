"""A class from its path in YAML."""

import importlib
from typing import Any

from lightning_bge.errors import ConfigError


def import_class(path: str, base: type, expected: str) -> Any:
    """The class at a path such as `optuna.samplers.CmaEsSampler`.

    Args:
        path: module and name.
        base: what it has to inherit from.
        expected: the beginning of the error message.

    Raises:
        ConfigError: there is no such class, or it does not inherit from `base`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{expected}, got {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{expected} that inherits from {base.__name__}, got {path}")
    return found
