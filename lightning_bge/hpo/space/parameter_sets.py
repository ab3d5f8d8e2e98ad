"""Points of a search space: those that are checked before a study starts, and those that it tries first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.search_space import Space, find_choice, finite_number, is_drawn, requirements, suggest


def ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    """All choices of a parameter, or both ends of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return (distribution.low, distribution.high)


def points_to_check(space: Space, configured: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Settings to be tried before a study starts: the ends of each parameter, one parameter at a time.

    With a conditional one go the values that it needs, each of them once; with a value that others need, the lowest
    values of those that it brings along: that is how trials have them.

    Args:
        space: the search space.
        configured: a setting's configured value, by its dotted name.
    """
    for name, distribution in space.items():
        needed = requirements(space, name)
        first = {parent: values[0] for parent, values in needed.items()}
        others = [first | {parent: value} for parent, values in needed.items() for value in values[1:]]
        for value in ends(distribution):
            for settings in (first, *others):
                yield complete_point(space, {**settings, name: value}, configured)


def complete_point(space: Space, point: Mapping[str, Any], configured: Callable[[str], Any]) -> dict[str, Any]:
    """The point, and the lowest value or first choice of each conditional parameter that would be drawn with it."""
    settings = dict(point)
    always = {name: configured(name) for name in space if name not in space.when}
    for name in space:  # those that others depend on come first
        if name in space.when and name not in settings and is_drawn(space, name, always | settings):
            settings[name] = ends(space[name])[0]
    return settings


def draw_points(space: Space, first: Sequence[Mapping[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many points as a study's trials have them: those given come first, what they leave out is drawn at random.

    Args:
        space: the search space.
        first: points that are tried first, as `parse_points` gives them.
        count: how many points in all.
        seed: of the draws.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    for point in first[:count]:
        study.enqueue_trial(dict(point))
    return [suggest(study.ask(), space) for _ in range(count)]


def parse_points(raw: Any, space: Space) -> list[dict[str, Any]]:
    """The points under `hpo.enqueue`, as trials have them: choices as listed, whole numbers as int, others as float.

    Raises:
        ConfigError: Names the point and the parameter, what was expected, and what came: a parameter that is not
            searched, a value outside of its range or choices, or one that is not drawn together with the others.
    """
    if not isinstance(raw, list | tuple):
        raise ConfigError(f"hpo.enqueue: expected a list of points, each {{name: value, ...}}, got {raw!r}.")
    points: list[dict[str, Any]] = []
    for number, spec in enumerate(raw, start=1):
        where = f"hpo.enqueue, point {number}"
        if not isinstance(spec, Mapping) or not spec:
            raise ConfigError(f"{where}: expected {{name of a searched parameter: value, ...}}, got {spec!r}.")
        point = {name: _point_value(where, space, name, value) for name, value in spec.items()}
        for name in point:
            _check_drawn(where, space, name, point)
        if point in points:
            raise ConfigError(f"{where}: equals point {points.index(point) + 1}; list every point once.")
        points.append(point)
    return points


def _point_value(where: str, space: Space, name: str, value: Any) -> Any:
    if name not in space:
        raise ConfigError(
            f"{where}: {name} is not searched; searched are {', '.join(space)}. "
            "Add it to hpo.space, or set it as any other setting."
        )
    distribution = space[name]
    if isinstance(distribution, CategoricalDistribution):
        return find_choice(f"{where}: {name}", distribution, value)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    number = finite_number(where, name, value)
    if not distribution._contains(number):
        steps = "" if distribution.step is None else f" in steps of {distribution.step}"
        raise ConfigError(
            f"{where}: {name}: expected {distribution.low} to {distribution.high}{steps}, got {value!r}; "
            "change the value, or the range in hpo.space."
        )
    return int(number) if isinstance(distribution, IntDistribution) else float(number)


def _check_drawn(where: str, space: Space, name: str, point: Mapping[str, Any]) -> None:
    for parent, allowed in space.when.get(name, {}).items():
        if parent not in point or point[parent] not in allowed:
            came = f"{parent} is {point[parent]!r}" if parent in point else f"{parent} is not given"
            raise ConfigError(
                f"{where}: {name} is drawn only when {parent} is one of {list(allowed)!r}, but {came}; "
                f"drop {name}, or set {parent} so."
            )
