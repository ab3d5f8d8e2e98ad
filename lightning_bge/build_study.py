"""A study of modules that a function of the user's makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.fabric.utilities.seed import seed_everything

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.module_experiment import LoggedMetric, ModuleExperiment, without_refit
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.parameter_sets import ends, parse_enqueued
from lightning_bge.hpo.space.search_space import Space, is_drawn, parse_space
from lightning_bge.hpo.trial.module_setup import ModuleTrialSetup
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.compat.lightning import trainer_class
from lightning_bge.runtime.nested_config import as_plain
from lightning_bge.templates import SpaceLike, StudyOptions, checked_options, class_path, parse_spaces
from lightning_bge.trainer import MODULE_DEFAULTS, module_trainer, warn_of_unused_callbacks

# called with the parameters of a trial; returns the module and its data module, or None where it has loaders of its own
BuildModule = Callable[[dict[str, Any]], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class BuildExperiment(ModuleExperiment):
    """As `ModuleExperiment`; the parameters have the names that the user's function gives them.

    Attributes:
        space: of the study, as `parse_space` reads it.
    """

    space: dict[str, Any]

    def build(self, overrides: dict[str, Any]) -> TrialSetup:
        """Fresh objects for a trial; of no parameters: of the first parameter set."""
        config, params = copy.deepcopy(self.config), dict(overrides or self.first_parameters())
        config.seed_everything = params.pop("seed_everything", config.seed_everything)
        config.params = params
        return self.create(config)

    def check_space(self, hpo: StudyConfig, space: Space) -> None:
        """Check the enqueued parameter sets: what the function accepts is its own."""
        parse_enqueued(hpo.enqueue, space)

    def configured(self, space: Space) -> dict[str, Any]:
        """Nothing is configured."""
        return {}

    def first_parameters(self) -> dict[str, Any]:
        """One parameter set of the space: the lower ends, and the first choices."""
        space = parse_space(self.space)
        values: dict[str, Any] = {}
        for name in space:  # those that others depend on come first
            if is_drawn(space, name, values):
                values[name] = ends(space[name])[0]
        return values


def study_of_function(
    build: BuildModule,
    space: SpaceLike,
    *,
    run_dir: Path,
    n_trials: int,
    metric: str | None,
    seed: int,
    trainer: Mapping[str, Any],
    options: StudyOptions,
) -> tuple[BuildExperiment, StudyConfig]:
    """Check the arguments of `tune`, which are described there, and return what the study varies and its options.

    Raises:
        ConfigError: an argument is wrong; names of options of the study begin with `hpo.`.
    """
    given = checked_options(options, {"pruner": PrunerConfig, "sampler": SamplerConfig, "monitor": LoggedMetric})
    if unused := [name for name in ("compile", "memory") if name in given]:
        raise ConfigError(f"{unused[0]}: expected nothing for a module of another project; give it callbacks instead")
    monitor = given.pop("monitor", None)
    if metric is not None:
        monitor = LoggedMetric(metric) if monitor is None else replace(monitor, metric=metric)
    monitor = monitor or LoggedMetric()
    spaces = parse_spaces(space)
    hpo = without_refit(StudyConfig(n_trials=n_trials, space=spaces, **{"baseline": False, **given}))
    if hpo.baseline:
        raise ConfigError("hpo.baseline: expected false for modules of a function, got true: none is configured")
    config = dict_to_namespace(
        {"run_dir": str(run_dir), "seed_everything": seed, "trainer": {**MODULE_DEFAULTS, **trainer}, "params": {}}
    )
    warn_of_unused_callbacks(trainer.get("callbacks"), "a study")

    def create(config: Namespace) -> TrialSetup:
        seed_everything(config.seed_everything, workers=True, verbose=False)
        params = config.params.as_dict() if isinstance(config.params, Namespace) else dict(config.params)
        module, data = _built(build, params)
        trainer = partial(module_trainer, trainer_class(module), config.trainer.as_dict())
        return ModuleTrialSetup(module, data, trainer, lambda: {"params": params})

    def plain(config: Namespace) -> dict[str, Any]:
        found = {name: value for name, value in config.as_dict().items() if name != "params"}
        found |= {"build": f"{build.__module__}.{build.__qualname__}", "monitor": asdict(monitor), "hpo": asdict(hpo)}
        return json.loads(json.dumps(as_plain(found), default=class_path))

    experiment = BuildExperiment(
        config=config,
        create=create,
        validate=lambda config: None,
        plain=plain,
        monitor=monitor,
        run_dir=run_dir,
        space=spaces,
    )
    return experiment, hpo


def _built(build: BuildModule, params: dict[str, Any]) -> tuple[Any, Any]:
    found = build(params)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(
            f"build: expected a module and a data module (or None), got {type(found).__name__}. Return both as a tuple"
        )
    return found
