"""The search space: from the YAML under `hpo.space` to Optuna's distributions, and back to plain data for comparison.

Names are the dotted names of settings::

    space:
      model.optimizer.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
      model.dropout: {low: 0.0, high: 0.3, step: 0.05}
      data.batch_size: {choices: [16, 32]}
      trainer.max_epochs: {type: int, low: 1, high: 5}
"""

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from lightning_bge.errors import ConfigError

Space = dict[str, BaseDistribution]

_KEYS = ("choices", "low", "high", "step", "log", "type")


def parse_space(raw: Mapping[str, Any]) -> Space:
    """Turn the mapping under `hpo.space` into distributions, in the order given.

    A range is an integer range when `low` and `high` (and `step`) are integers, unless `type: float` says otherwise.

    Args:
        raw: For each name a mapping with `choices`, or with `low` and `high` and optionally `step`, `log`, `type`.

    Raises:
        ConfigError: Names the parameter, what was expected, and what came.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(f"hpo.space: expected at least one parameter, got {raw!r}; see the search-space form.")
    return {name: _parse(f"hpo.space.{name}", spec) for name, spec in raw.items()}


def _parse(where: str, spec: Any) -> BaseDistribution:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where}: expected {{low, high}} or {{choices}}, got {spec!r}; a fixed value is no search.")
    unknown = [key for key in spec if key not in _KEYS]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}. Names of settings are written dotted."
        )
    if "choices" in spec:
        if len(spec) > 1:
            raise ConfigError(f"{where}: 'choices' stands alone, got {', '.join(map(str, spec))} as well.")
        return _choices(where, spec["choices"])
    if "low" not in spec or "high" not in spec:
        raise ConfigError(f"{where}: expected either 'choices' or both 'low' and 'high', got {dict(spec)!r}.")
    return _range(where, spec)


def _choices(where: str, choices: Any) -> CategoricalDistribution:
    if not isinstance(choices, list | tuple) or not choices:
        raise ConfigError(f"{where}: 'choices' must be a list of at least one value, got {choices!r}.")
    for i, choice in enumerate(choices):
        if not (choice is None or isinstance(choice, bool | int | float | str)):
            raise ConfigError(f"{where}: a choice must be null, true/false, a number or text, got {choice!r}.")
        if isinstance(choice, float) and not math.isfinite(choice):
            raise ConfigError(f"{where}: a choice must be finite, got {choice!r}.")
        if choice in choices[:i]:  # Optuna looks a choice up by equality, and 1 == True == 1.0
            raise ConfigError(f"{where}: {choice!r} equals an earlier choice; list every choice once.")
    return CategoricalDistribution(tuple(choices))


def _number(where: str, key: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        hint = " (YAML reads 1e-5 as text: write 1.0e-5)" if isinstance(value, str) else ""
        raise ConfigError(f"{where}: {key!r} must be a finite number, got {value!r}{hint}.")
    return value


def _range(where: str, spec: Mapping[str, Any]) -> IntDistribution | FloatDistribution:
    numbers = {key: _number(where, key, spec[key]) for key in ("low", "high", "step") if key in spec}
    low, high, step, log = numbers["low"], numbers["high"], numbers.get("step"), spec.get("log", False)
    if low > high:
        raise ConfigError(f"{where}: 'low' is {low} and 'high' is {high}; swap the bounds.")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: 'log' must be true or false, got {log!r}.")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range needs low > 0, got {low}; raise 'low' or drop 'log'.")
    if log and step is not None:
        raise ConfigError(f"{where}: 'log' and 'step' do not go together; drop one of them.")
    if step is not None and step <= 0:
        raise ConfigError(f"{where}: 'step' must be above 0, got {step}.")
    distribution = _build_range(where, spec.get("type"), numbers, log)
    if distribution.high != high:
        raise ConfigError(
            f"{where}: 'high' ({high}) is not low + n * step; the last value would be {distribution.high}. Write that."
        )
    return distribution


def _build_range(
    where: str, kind: Any, numbers: dict[str, int | float], log: bool
) -> IntDistribution | FloatDistribution:
    if kind not in (None, "int", "float"):
        raise ConfigError(f"{where}: 'type' must be int or float, got {kind!r}.")
    whole = all(value == int(value) for value in numbers.values())
    if kind == "int" and not whole:
        raise ConfigError(f"{where}: type int needs whole numbers, got {numbers}.")
    if kind is None:
        kind = "int" if all(isinstance(value, int) for value in numbers.values()) else "float"
    with warnings.catch_warnings():
        # Optuna warns and lowers `high` when the step does not divide the range; the caller makes that an error
        warnings.simplefilter("ignore")
        if kind == "int":
            low, high, step = (int(numbers.get(key, 1)) for key in ("low", "high", "step"))
            return IntDistribution(low, high, log=log, step=step)
        return FloatDistribution(numbers["low"], numbers["high"], log=log, step=numbers.get("step"))


def suggest(trial: optuna.trial.BaseTrial, space: Space) -> dict[str, Any]:
    """Draw one value for each parameter of the space, in its order."""
    values: dict[str, Any] = {}
    for name, dist in space.items():
        if isinstance(dist, FloatDistribution):
            values[name] = trial.suggest_float(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, IntDistribution):
            values[name] = trial.suggest_int(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, dist.choices)
        else:
            raise TypeError(f"{name}: no way to suggest from {dist!r}")
    return values


def space_to_json(space: Space) -> dict[str, dict[str, Any]]:
    """Return the space as plain data, equal before and after a trip through JSON, with the names sorted.

    The order of choices counts: Optuna stores a choice by its index.
    """
    return {name: json.loads(distribution_to_json(space[name])) for name in sorted(space)}


def describe_difference(old: Mapping[str, dict[str, Any]], new: Mapping[str, dict[str, Any]]) -> str:
    """Say how two results of `space_to_json` differ, one line for each parameter; the empty string when equal."""
    lines = []
    for name in sorted({*old, *new}):
        if name not in new:
            lines.append(f"{name}: no longer searched")
        elif name not in old:
            lines.append(f"{name}: not searched before")
        elif old[name] != new[name]:
            before, after = _flat(old[name]), _flat(new[name])
            keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
            lines.append(f"{name}: " + ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys))
    return "\n".join(lines)


def _flat(dist: dict[str, Any]) -> dict[str, Any]:
    return {"type": dist["name"].removesuffix("Distribution").lower(), **dist["attributes"]}
