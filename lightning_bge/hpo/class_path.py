"""Objects of Optuna that YAML names by the path of their class."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from optuna.exceptions import ExperimentalWarning

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.class_path import find_class


def build_from_path(
    option: str,
    path: str,
    base: type,
    init_args: Mapping[str, Any],
    *,
    names: str,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """An object of the class at a path such as `optuna.samplers.CmaEsSampler`.

    Args:
        option: that has the name and the arguments, such as `hpo.sampler`; for error messages.
        path: module and name.
        base: what the class has to inherit from.
        init_args: its arguments.
        names: what could be named instead of a path; for error messages.
        defaults: further arguments, where the class has such ones and they are not given.

    Raises:
        ConfigError: there is no such class, it does not inherit from `base`, or it does not accept the arguments.
    """
    expected = f"{option}.name: expected one of {names}, or the path of a class that inherits from {base.__name__}"
    kind = find_class(path, base, expected)
    known = inspect.signature(kind).parameters
    arguments = {name: value for name, value in (defaults or {}).items() if name in known} | dict(init_args)
    try:
        with warnings.catch_warnings():  # some are experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            return kind(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{option}.init_args: {path} does not accept {dict(init_args)}: {error}") from error
