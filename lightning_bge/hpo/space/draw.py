"""Draws the parameter sets of a study: each once, and by its ordinal, whoever draws it and however often.

Optuna's samplers draw from one stream of random numbers in each process, so that workers that start together draw the
same values, and a study that was stopped goes on with other ones. Here the seed of each draw is made of the study's
seed and of the ordinal of the parameter set.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.class_path import build_from_path
from lightning_bge.hpo.space.search_space import Space, is_drawn, suggest
from lightning_bge.hpo.trials import key_of
from lightning_bge.runtime.compat.optuna import storage_of, study_id_of

ATTEMPTS = 20  # at a parameter set that is not there yet, before one is drawn at random
RANDOM_ATTEMPTS = 1000
MAX_GRID = 100_000  # parameter sets of a space that are listed

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
}


@dataclass(frozen=True)
class SamplerConfig:
    """How parameter sets are drawn.

    Attributes:
        name: `tpe` (Optuna's default: multivariate, with constant liar), `random`, `grid` (each parameter set of a
            finite space, in random order), `qmc` (a Sobol sequence), or the path of a sampler's class, such as
            `optuna.samplers.CmaEsSampler`.
        seed: of the draws.
        init_args: of a sampler that is given by the path of its class. One with an argument `seed` gets a seed for each
            draw, unless it is named here.

    Raises:
        ConfigError: the name is none of these, or does not lead to a sampler.
    """

    name: str = "tpe"
    seed: int = 42
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.init_args and "." not in self.name:
            raise ConfigError(f"hpo.sampler.init_args: not used by {self.name!r}; remove it")
        if self.name != "grid":
            self.build(0)

    def build(self, seed: int) -> BaseSampler:
        """A sampler for one draw."""
        if self.name in SAMPLERS:
            return SAMPLERS[self.name](seed=seed)
        if self.name == "qmc":  # its sequence is one for the whole study
            args = {"scramble": True, "seed": self.seed, "warn_independent_sampling": False}
            return replace(self, name="optuna.samplers.QMCSampler", init_args=args).build(seed)
        names = ", ".join([*SAMPLERS, "grid", "qmc"])
        sampler: BaseSampler = build_from_path(
            "hpo.sampler", self.name, BaseSampler, self.init_args, names=names, defaults={"seed": seed}
        )
        return sampler


def n_parameter_sets(n_trials: int, space: Space) -> int:
    """How many parameter sets a study of so many trials has: fewer where the space has fewer."""
    return int(min(n_trials, space_size(space)))


def space_size(space: Space) -> float:
    """The number of parameter sets of a space; infinite where a parameter has no step."""
    parents = {parent for conditions in space.when.values() for parent in conditions}

    def count(names: Sequence[str], values: dict[str, Any]) -> float:
        if not names:
            return 1
        name, *rest = names
        if not is_drawn(space, name, values):
            return count(rest, values)
        if name in parents:
            return sum(count(rest, {**values, name: value}) for value in values_of(space[name]))
        return n_values(space[name]) * count(rest, values)

    return count(list(space), {})


def n_values(distribution: BaseDistribution) -> float:
    """How many values a parameter has; infinite where it has no step."""
    if distribution.single():
        return 1
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    assert isinstance(distribution, FloatDistribution)
    step = distribution.step
    return math.inf if step is None else round((distribution.high - distribution.low) / step) + 1


def values_of(distribution: BaseDistribution) -> list[Any]:
    """All values of a parameter that has a finite number of them."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    step = distribution.step or 1
    return [min(distribution.low + i * step, distribution.high) for i in range(int(n_values(distribution)))]


def all_parameter_sets(space: Space) -> Iterator[dict[str, Any]]:
    """All parameter sets of a finite space."""

    def extend(names: Sequence[str], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not names:
            yield values
            return
        name, *rest = names
        for more in [{name: value} for value in values_of(space[name])] if is_drawn(space, name, values) else [{}]:
            yield from extend(rest, values | more)

    return extend(list(space), {})


def check_grid(space: Space) -> None:
    """Raise ConfigError where a space has too many parameter sets to list."""
    if (size := space_size(space)) > MAX_GRID:
        endless = [name for name, one in space.items() if math.isinf(n_values(one))]
        verb = "has" if len(endless) == 1 else "have"
        which = f"{', '.join(endless)} {verb} no step" if endless else f"this one has {size:,.0f}"
        raise ConfigError(
            f"hpo.sampler.name: grid needs a space of at most {MAX_GRID:,} parameter sets, but {which}; "
            "give `choices` or a `step`, or take another sampler"
        )


class _Draft(InMemoryStorage):
    """Holds the trial that is being drawn; a sampler that asks for the study's trials gets the given ones."""

    def __init__(self, trials: Sequence[FrozenTrial], number: int, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.trials, self.number, self.fixed = list(trials), number, dict(fixed)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self.set_trial_system_attr(trial_id, "fixed_params", self.fixed)
        self.get_trial(trial_id).number = self.number  # samplers leave out the trial itself by its number
        return trial_id

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]


def draw_parameter_set(
    study: optuna.Study,
    space: Space,
    config: SamplerConfig,
    *,
    seen: Sequence[FrozenTrial],
    ordinal: int,
    taken: AbstractSet[Any],
    given: Mapping[str, Any] | None = None,
) -> FrozenTrial | None:
    """Draw a parameter set that the study has not.

    Args:
        study: its direction and its system attributes are read; a sampler may write attributes.
        space: the search space.
        config: the sampler.
        seen: the trials from which the sampler learns, one of each parameter set.
        ordinal: how many parameter sets the study has.
        taken: their keys (`key_of`).
        given: values that are not drawn.

    Returns:
        A trial with parameters, their distributions, and what the sampler has attached to it. None: there is none left,
        or the given values are all, and the study has them.
    """
    fixed = dict(given or {})
    for attempt in range(0 if config.name == "grid" else ATTEMPTS):
        found = _sample(study, space, config.build(_seed(config.seed, ordinal, attempt)), seen, fixed)
        if key_of(found.params) not in taken:
            return found
    random = np.random.default_rng([config.seed, ordinal])
    if (size := space_size(space)) <= MAX_GRID:
        order = np.random.default_rng(config.seed).permutation(int(size))
        listed = list(all_parameter_sets(space))
        wanted, ordered = set(key_of(fixed)), (listed[i] for i in order)
        left = [one for one in ordered if wanted <= set(key_of(one)) and key_of(one) not in taken]
        if not left:
            return None
        chosen = left[0] if config.name == "grid" else left[random.integers(len(left))]
        return _sample(study, space, optuna.samplers.RandomSampler(), seen, chosen)
    for _ in range(RANDOM_ATTEMPTS):
        sampler = optuna.samplers.RandomSampler(int(random.integers(2**32)))
        found = _sample(study, space, sampler, seen, fixed)
        if key_of(found.params) not in taken:
            return found
    return None


class _KnownSpace(BaseSampler):
    """A TPE sampler that is told what all trials have; it would find that by comparing all of them each time."""

    def __init__(self, sampler: optuna.samplers.TPESampler, space: Space) -> None:
        self.sampler = sampler
        self.always = {name: one for name, one in sorted(space.items()) if name not in space.when and not one.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.always

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _sample(
    study: optuna.Study, space: Space, sampler: BaseSampler, seen: Sequence[FrozenTrial], fixed: Mapping[str, Any]
) -> FrozenTrial:
    storage, real, study_id = storage_of(study), study.study_name, study_id_of(study)
    draft = _Draft(seen, max((trial.number for trial in seen), default=-1) + 1, fixed)
    if isinstance(sampler, optuna.samplers.TPESampler):
        sampler = _KnownSpace(sampler, space)
    copy = optuna.create_study(storage=draft, study_name=real, directions=study.directions, sampler=sampler)
    known, draft_id = storage.get_study_system_attrs(study_id), draft.get_study_id_from_name(real)
    for name, value in known.items():  # in which some samplers keep their state
        draft.set_study_system_attr(draft_id, name, value)
    trial = copy.ask()
    suggest(trial, space)
    for name, value in draft.get_study_system_attrs(draft_id).items():
        if known.get(name) != value:
            storage.set_study_system_attr(study_id, name, value)
    return draft.get_trial(0)
