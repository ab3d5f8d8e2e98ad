"""The search space: from the YAML under `hpo.space` to Optuna's distributions, and back to plain data for comparison.

Names are the dotted names of options::

    space:
      model.optimizer.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
      model.dropout: {low: 0.0, high: 0.3, step: 0.05}
      data.batch_size: {choices: [16, 32]}
      trainer.max_epochs: {type: int, low: 1, high: 5}
      model.loss.name: {choices: [bce, focal]}
      model.loss.focal_gamma: {low: 0.5, high: 5.0, when: {model.loss.name: focal}}

The last one is conditional: it is drawn where the loss is focal, and keeps its configured value elsewhere.
"""

import math
import warnings
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bge.errors import ConfigError

Conditions = dict[str, tuple[Any, ...]]  # name of another parameter -> its values, in the order of its choices

_KEYS = ("choices", "low", "high", "step", "log", "type", "when")


class Space(dict[str, BaseDistribution]):
    """Distributions by name, in the order of the YAML, except that those on which others depend come first.

    Attributes:
        when: for each conditional parameter the values of other parameters that it needs: all of these others have to
            be drawn in the same trial, each with one of the values given.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], when: Mapping[str, Conditions]) -> None:
        super().__init__(distributions)
        self.when = dict(when)


def parse_space(raw: Mapping[str, Any]) -> Space:
    """Turn the mapping under `hpo.space` into distributions.

    A range is an integer range when `low` and `high` (and `step`) are integers, unless `type: float` says otherwise.

    Args:
        raw: For each name a mapping with `choices`, or with `low` and `high` and optionally `step`, `log`, `type`; and
            optionally `when`: name of another parameter with `choices` -> the value or list of values that it must have
            for this one to be drawn. Of several entries all must hold.

    Raises:
        ConfigError: Names the parameter, what was expected, and what came. For conditions: an unknown name, one
            of a range, a value that is no choice, a cycle, conditions that can't hold together.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(f"hpo.space: expected at least one parameter, got {raw!r}; see docs/search.md.")
    parsed = {name: _parse(f"hpo.space.{name}", spec) for name, spec in raw.items()}
    when = {name: _conditions(name, spec["when"], parsed) for name, spec in raw.items() if "when" in spec}
    space = Space({name: parsed[name] for name in _parents_first(list(parsed), when)}, when)
    for name in when:
        requirements(space, name)
    return space


def _parse(where: str, spec: Any) -> BaseDistribution:
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{where}: expected {{low, high}} or {{choices}}, got {spec!r}; set a fixed value as an ordinary option."
        )
    unknown = [key for key in spec if key not in _KEYS]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}. Names of options are written dotted, "
            "like model.optimizer.lr."
        )
    spec = {key: value for key, value in spec.items() if key != "when"}
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
        if choice in choices[:i]:  # Optuna finds a choice by equality, and 1 == True == 1.0
            raise ConfigError(f"{where}: {choice!r} equals an earlier choice; list every choice once.")
    return CategoricalDistribution(tuple(choices))


def finite_number(where: str, key: str, value: Any) -> int | float:
    """The value, if it is a finite number; else raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        hint = " (YAML reads 1e-5 as text: write 1.0e-5)" if isinstance(value, str) else ""
        raise ConfigError(f"{where}: {key!r} must be a finite number, got {value!r}{hint}.")
    return value


def _range(where: str, spec: Mapping[str, Any]) -> IntDistribution | FloatDistribution:
    numbers = {key: finite_number(where, key, spec[key]) for key in ("low", "high", "step") if key in spec}
    low, high, step, log = numbers["low"], numbers["high"], numbers.get("step"), spec.get("log", False)
    if low > high:
        raise ConfigError(f"{where}: 'low' is {low} and 'high' is {high}; swap the bounds.")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: 'log' must be true or false, got {log!r}.")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range needs low > 0, got {low}; raise 'low' or drop 'log'.")
    if log and step is not None:
        raise ConfigError(f"{where}: 'log' and 'step' exclude each other; drop one of them.")
    if step is not None and step <= 0:
        raise ConfigError(f"{where}: 'step' must be above 0, got {step}.")
    kind = spec.get("type")
    if kind is None:
        kind = "int" if all(isinstance(value, int) for value in numbers.values()) else "float"
    if kind not in ("int", "float"):
        raise ConfigError(f"{where}: 'type' must be int or float, got {kind!r}.")
    if kind == "int" and any(value != int(value) for value in numbers.values()):
        raise ConfigError(f"{where}: type int needs whole numbers, got {numbers}.")
    distribution: IntDistribution | FloatDistribution
    with warnings.catch_warnings():
        # Optuna lowers `high` with a warning when the step does not divide the range; here it is an error
        warnings.simplefilter("ignore")
        if kind == "int":
            distribution = IntDistribution(int(low), int(high), log=log, step=int(step or 1))
        else:
            distribution = FloatDistribution(low, high, log=log, step=step)
    if distribution.high != high:
        raise ConfigError(
            f"{where}: 'high' ({high}) is not low + n * step; the last value would be {distribution.high}; "
            "set 'high' to that."
        )
    return distribution


# ---------------------------------------------------------------------- conditions


def _conditions(name: str, raw: Any, parsed: Mapping[str, BaseDistribution]) -> Conditions:
    where = f"hpo.space.{name}.when"
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(f"{where}: expected {{name of another parameter: value or list of values}}, got {raw!r}.")
    return {parent: _allowed(where, parent, values, parsed) for parent, values in raw.items()}


def _allowed(where: str, parent: str, values: Any, parsed: Mapping[str, BaseDistribution]) -> tuple[Any, ...]:
    if parent not in parsed:
        known = ", ".join(parsed)
        raise ConfigError(f"{where}: {parent} is not searched; name one of {known}, or drop the condition.")
    distribution = parsed[parent]
    if not isinstance(distribution, CategoricalDistribution):
        raise ConfigError(
            f"{where}: {parent} is a range, and conditions are on parameters with 'choices' only; "
            "write its values as choices, or drop the condition."
        )
    wanted = list(values) if isinstance(values, list | tuple) else [values]
    found = [find_choice(f"{where}.{parent}", distribution, value) for value in wanted]
    if not found:
        raise ConfigError(f"{where}.{parent}: no value is given, so that it is never drawn; list at least one.")
    return tuple(choice for choice in distribution.choices if choice in found)


def find_choice(where: str, distribution: CategoricalDistribution, value: Any) -> Any:
    """The choice that equals the value, where true is not 1; `ConfigError` if there is none."""
    for choice in distribution.choices:
        if isinstance(choice, bool) == isinstance(value, bool) and choice == value:
            return choice
    raise ConfigError(f"{where}: expected one of the choices {list(distribution.choices)!r}, got {value!r}.")


def _parents_first(names: list[str], when: Mapping[str, Conditions]) -> list[str]:
    """The names in their order, except that each comes after those on which it depends."""
    try:
        TopologicalSorter(when).prepare()
    except CycleError as error:
        cycle = " <- ".join(reversed(error.args[1]))
        raise ConfigError(f"hpo.space: conditions form a cycle: {cycle}; drop one of them.") from error
    ordered: list[str] = []
    while len(ordered) < len(names):
        ordered.append(
            next(n for n in names if n not in ordered and all(parent in ordered for parent in when.get(n, ())))
        )
    return ordered


def requirements(space: Space, name: str) -> Conditions:
    """All that a parameter needs to be drawn: its conditions, those of the parameters in them, and so on.

    Raises:
        ConfigError: it can never be drawn.
    """
    found: Conditions = {}
    waiting = [name]
    while waiting:
        for parent, values in space.when.get(waiting.pop(), {}).items():
            both = tuple(value for value in found.get(parent, values) if value in values)
            if not both:
                raise ConfigError(
                    f"hpo.space.{name}.when: is never drawn: {parent} would have to be one of "
                    f"{list(found[parent])!r} and one of {list(values)!r}; change one of the conditions."
                )
            found[parent] = both
            waiting.append(parent)
    return {parent: found[parent] for parent in space if parent in found}


def is_drawn(space: Space, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a trial that has drawn these values, those of all its parents among them, draws this parameter."""
    conditions = space.when.get(name, {})
    return all(parent in values and values[parent] in allowed for parent, allowed in conditions.items())


def suggest(trial: optuna.trial.BaseTrial, space: Space) -> dict[str, Any]:
    """Draw one value for each parameter of the space whose conditions hold, in its order.

    Optuna's TPE draws those that all finished trials have from their joint distribution, and conditional ones each by
    itself, from the trials that have it.
    """
    values: dict[str, Any] = {}
    for name, dist in space.items():
        if not is_drawn(space, name, values):
            continue
        if isinstance(dist, FloatDistribution):
            values[name] = trial.suggest_float(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, IntDistribution):
            values[name] = trial.suggest_int(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, dist.choices)
        else:
            raise TypeError(f"{name}: expected a float, int or categorical distribution, got {dist!r}")
    return values


def spec_of(name: str, distribution: BaseDistribution) -> dict[str, Any]:
    """A distribution in the form that `parse_space` reads.

    Raises:
        ConfigError: it is none of Optuna's float, int and categorical distributions.
    """
    if isinstance(distribution, CategoricalDistribution):
        return {"choices": list(distribution.choices)}
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        raise ConfigError(
            f"hpo.space.{name}: expected a FloatDistribution, IntDistribution or CategoricalDistribution of "
            f"optuna.distributions, or a dict like {{'low': 0.0, 'high': 1.0}}, got {distribution!r}."
        )
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    spec = {"low": distribution.low, "high": distribution.high, "type": kind}
    if distribution.log:  # Optuna gives logarithmic integers a step of 1, which means nothing there
        return {**spec, "log": True}
    return spec if distribution.step is None else {**spec, "step": distribution.step}


def space_to_json(space: Space) -> dict[str, dict[str, Any]]:
    """Return the space as plain data that `parse_space` reads, equal before and after a trip through JSON.

    Names are sorted. The order of choices counts: Optuna stores a choice by its index.
    """
    found = {name: spec_of(name, space[name]) for name in sorted(space)}
    for name, conditions in space.when.items():
        found[name]["when"] = {parent: list(values) for parent, values in sorted(conditions.items())}
    return found
