"""Parameter sets of a search space: those that are checked before a study starts, and those that it tries first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.search_space import Space, find_choice, finite_number, is_drawn, requirements, suggest

STEP_TOLERANCE = 1e-8  # of a value's number of steps above the lowest, as Optuna's


def ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    """All choices of a parameter, or both ends of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return (distribution.low, distribution.high)


def parameter_sets_to_check(space: Space, configured: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """What is tried before a study starts: both ends of each parameter, one parameter at a time.

    A conditional parameter is tried with each of the values that it needs; a value that other parameters need, with the
    lowest values of those: these are combinations that trials have.

    Args:
        space: the search space.
        configured: an option's configured value, by its dotted name.
    """
    for name, distribution in space.items():
        needed = requirements(space, name)
        first = {parent: values[0] for parent, values in needed.items()}
        others = [first | {parent: value} for parent, values in needed.items() for value in values[1:]]
        for value in ends(distribution):
            for conditions in (first, *others):
                yield complete_parameter_set(space, {**conditions, name: value}, configured)


def complete_parameter_set(space: Space, given: Mapping[str, Any], configured: Callable[[str], Any]) -> dict[str, Any]:
    """The given values, and the lowest value or first choice of each conditional parameter that is drawn with them."""
    values = dict(given)
    always = {name: configured(name) for name in space if name not in space.when}
    for name in space:  # those that others depend on come first
        if name in space.when and name not in values and is_drawn(space, name, always | values):
            values[name] = ends(space[name])[0]
    return values


def draw_parameter_sets(
    space: Space, first: Sequence[Mapping[str, Any]], count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Parameter sets as a study's trials have them: the given ones, and then random ones.

    Args:
        space: the search space.
        first: those that are tried first, as `parse_enqueued` returns them; what they leave out is drawn.
        count: how many in all.
        seed: of the draws.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    for values in first[:count]:
        study.enqueue_trial(dict(values))
    return [suggest(study.ask(), space) for _ in range(count)]


def parse_enqueued(raw: Any, space: Space) -> list[dict[str, Any]]:
    """The parameter sets under `hpo.enqueue`, with the types that trials have: choices as listed, int, or float.

    Raises:
        ConfigError: names the parameter set and the parameter, what was expected, and what came: a parameter that is
            not searched, a value outside of its range or choices, or one that is not drawn together with the others.
    """
    if not isinstance(raw, list | tuple):
        raise ConfigError(f"hpo.enqueue: expected a list of parameter sets, each {{name: value, ...}}, got {raw!r}.")
    found: list[dict[str, Any]] = []
    for number, spec in enumerate(raw, start=1):
        where = f"hpo.enqueue, parameter set {number}"
        if not isinstance(spec, Mapping) or not spec:
            raise ConfigError(f"{where}: expected {{name of a searched parameter: value, ...}}, got {spec!r}.")
        values = {name: _value(where, space, name, value) for name, value in spec.items()}
        for name in values:
            _check_drawn(where, space, name, values)
        if values in found:
            raise ConfigError(f"{where}: equals parameter set {found.index(values) + 1}; list each one once.")
        found.append(values)
    return found


def _value(where: str, space: Space, name: str, value: Any) -> Any:
    if name not in space:
        raise ConfigError(
            f"{where}: {name} is not searched; searched are {', '.join(space)}. "
            "Add it to hpo.space, or set it as any other option."
        )
    distribution = space[name]
    if isinstance(distribution, CategoricalDistribution):
        return find_choice(f"{where}: {name}", distribution, value)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    number = finite_number(where, name, value)
    if not _in_range(distribution, number):
        steps = "" if distribution.step is None else f" in steps of {distribution.step}"
        raise ConfigError(
            f"{where}: {name}: expected {distribution.low} to {distribution.high}{steps}, got {value!r}; "
            "change the value, or the range in hpo.space."
        )
    return int(number) if isinstance(distribution, IntDistribution) else float(number)


def _in_range(distribution: IntDistribution | FloatDistribution, number: float) -> bool:
    if not distribution.low <= number <= distribution.high:
        return False
    steps = 0.0 if distribution.step is None else (number - distribution.low) / distribution.step
    return abs(steps - round(steps)) < STEP_TOLERANCE


def _check_drawn(where: str, space: Space, name: str, values: Mapping[str, Any]) -> None:
    for parent, allowed in space.when.get(name, {}).items():
        if parent not in values or values[parent] not in allowed:
            came = f"{parent} is {values[parent]!r}" if parent in values else f"{parent} is not given"
            raise ConfigError(
                f"{where}: {name} is drawn only when {parent} is one of {list(allowed)!r}, but {came}; "
                f"drop {name}, or change {parent}."
            )
