"""Model and data module as templates of a study: the objects of its trials are made from their arguments."""

import copy
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import optuna
from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch import Trainer
from optuna.distributions import BaseDistribution

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MemoryConfig, MicroBatchFinder
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.sources import has_groups
from lightning_bge.errors import INTERRUPTED, ConfigError, UserError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import CostName
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import spec_of
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trackers.config import Trackers
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.models.metrics.names import Metric
from lightning_bge.runtime.compat.lightning import LOGGERS
from lightning_bge.runtime.dotted_config import LINKS, with_overrides
from lightning_bge.runtime.nested_config import as_config, as_plain
from lightning_bge.trainer import HARMLESS_WARNINGS, BGETrainer, quiet_trainer, take_options, warn_of_unused_callbacks

CONFIGS: dict[str, Any] = {
    "pruner": PrunerConfig,
    "sampler": SamplerConfig,
    "monitor": MonitorConfig,
    "compile": CompileConfig,
    "memory": MemoryConfig,
}
SpaceLike = Mapping[str, BaseDistribution | Mapping[str, Any]]


class StudyOptions(TypedDict, total=False):
    """Further options of a study: fields of `StudyConfig`, and the configs of metric, compilation and memory."""

    enqueue: list[dict[str, Any]]
    pruner: PrunerConfig | dict[str, Any]
    sampler: SamplerConfig | dict[str, Any]
    timeout: float | None
    terminator: bool
    max_failures: int
    max_worker_deaths: int
    val_check_interval: float
    seed_replicates: int | None
    cost: CostName | None
    refit: bool
    baseline: bool
    predictions_gb: float
    refit_val_file: bool
    calibration: Literal["temperature"] | None
    ensemble: bool
    outer_folds: int | None
    files: str | None
    weights_only: bool
    trackers: Trackers
    storage: str | None
    study_name: str | None
    storage_timeout: float
    worker_timeout: float
    encoder_cache_gb: float | None
    monitor: MonitorConfig | dict[str, Any]
    compile: CompileConfig | dict[str, Any]
    memory: MemoryConfig | dict[str, Any]


def study_of_templates(
    model: BGEClassifier,
    data: TextDataModule,
    space: SpaceLike,
    *,
    run_dir: Path,
    n_trials: int,
    metric: Metric | None,
    seed: int,
    trainer: Mapping[str, Any],
    options: StudyOptions,
) -> tuple[TextExperiment, StudyConfig]:
    """Check the arguments of `tune`, which are described there, and return what the study varies and its options.

    `trainer` has `max_epochs` besides.

    Raises:
        ConfigError: an argument is wrong; names of options of the study begin with `hpo.`.
    """
    given = checked_options(options, CONFIGS)
    own = {name: given.pop(name, kind()) for name, kind in CONFIGS.items() if name not in ("pruner", "sampler")}
    _check_templates(model, data)
    monitor = replace(own["monitor"], metric=metric or own["monitor"].metric)
    own["monitor"] = check_monitor(monitor, model.hparams["task"], has_groups(data.hparams))
    hpo = StudyConfig(n_trials=n_trials, space=parse_spaces(space), **given)
    template = _Template(model=model, data=data, hpo=hpo, **own)
    return template.experiment(template.config(run_dir, seed, trainer)), hpo


@dataclass(frozen=True)
class _Template:
    """What each trial is made from."""

    model: BGEClassifier
    data: TextDataModule
    memory: MemoryConfig
    monitor: MonitorConfig
    compile: CompileConfig
    hpo: StudyConfig

    def config(self, run_dir: Path, seed: int, trainer: Mapping[str, Any]) -> Namespace:
        """All options, by their dotted names, with the links of the command line followed."""
        options: dict[str, Any] = {
            "run_dir": str(run_dir),
            "seed_everything": seed,
            "model": copy.deepcopy(dict(self.model.hparams)),
            "data": copy.deepcopy(dict(self.data.hparams)),
            "trainer": _trainer_arguments(trainer),
        }
        return with_overrides(dict_to_namespace(options), {})

    def experiment(self, config: Namespace) -> TextExperiment:
        """The options of the study's trials, and how objects are made of them."""
        warn_of_unused_callbacks(config.trainer.callbacks, "a study")
        trainer = quiet_trainer(config.as_dict()["trainer"])
        if trainer.world_size > 1:
            raise ConfigError(f"trainer: expected devices=1, as a study trains on one device, got {trainer.world_size}")
        return TextExperiment(
            config=config,
            create=self._create,
            validate=lambda config: None,  # the constructors check their arguments
            plain=self._plain,
            datamodule=self._datamodule(config),
            monitor=self.monitor,
            compile=self.compile,
            memory=self.memory,
            run_dir=Path(config.run_dir),
        )

    def _datamodule(self, config: Namespace) -> TextDataModule:
        return type(self.data)(**config.as_dict()["data"])

    def _create(self, config: Namespace) -> TextTrialSetup:
        model, data = type(self.model)(**config.as_dict()["model"]), self._datamodule(config)
        model.monitored = self.monitor.metric
        take_options(config.as_dict()["trainer"], model, data)
        data.setup("fit")
        finder = MicroBatchFinder(self.memory, data.cache_dir)
        trainer = partial(quiet_trainer, config.as_dict()["trainer"], finder)
        return TextTrialSetup(model, data, trainer, partial(self._fit_options, config))

    def _fit_options(self, config: Namespace) -> dict[str, Any]:
        options = self._plain(config)
        del options["hpo"]
        return options

    def _plain(self, config: Namespace) -> dict[str, Any]:
        """What the command line would have as its options: it reads `best.yaml`, and a report shows them."""
        options = config.as_dict()
        for _, target in LINKS:
            *folders, name = target.split(".")
            section = options
            for folder in folders:
                section = section[folder]
            del section[name]
        options |= {name: asdict(getattr(self, name)) for name in ("monitor", "compile", "memory", "hpo")}
        return json.loads(json.dumps(as_plain(options), default=class_path))


def class_path(value: Any) -> dict[str, str]:
    """What stands for an object in plain data."""
    return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}"}


def _trainer_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the trainer, with their defaults."""
    known = {
        name: parameter.default
        for kind in (Trainer, BGETrainer)
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"trainer: there is no argument {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {**known, **given}


def _check_templates(model: Any, data: Any) -> None:
    for name, value, kind in (("model", model, BGEClassifier), ("data", data, TextDataModule)):
        if not isinstance(value, kind):
            raise ConfigError(f"{name}: expected a {kind.__name__}, got {value!r}")


def checked_options(options: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with dicts turned into configs: name of the option -> class of its config."""
    known = sorted(StudyOptions.__annotations__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            f"there is no argument {', '.join(unknown)}; further options of a study are {', '.join(known)}"
        )
    return {
        name: as_config(configs[name], value, name) if name in configs else value for name, value in options.items()
    }


def parse_spaces(space: SpaceLike) -> dict[str, dict[str, Any]]:
    """The search space as in a YAML file."""
    if not isinstance(space, Mapping):
        raise ConfigError(
            "hpo.space: expected a dict from dotted names to distributions of optuna.distributions, got "
            f"{space!r}. For a condition write a dict like {{'low': 0.5, 'high': 5.0, 'when': {{name: value}}}}"
        )
    return {name: dict(spec) if isinstance(spec, Mapping) else spec_of(name, spec) for name, spec in space.items()}


@contextmanager
def errors_of_arguments(kept: str) -> Iterator[None]:
    """Errors that name arguments, whose names are those of the command line without `hpo.`.

    Args:
        kept: what an interrupted call has kept, for the message.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(r"(?<![\w/.-])hpo\.", "", str(error))) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None
    except SystemExit as stop:
        # 1 is what Lightning's `fit` makes of Ctrl-C
        if stop.code in (1, INTERRUPTED):
            raise KeyboardInterrupt(kept) from None
        raise


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Of the libraries' messages only those on which a user can act, for the length of a call."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels, verbosity = [logger.level for logger in loggers], optuna.logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            for pattern in HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", pattern)
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            quiet_optuna()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        optuna.logging.set_verbosity(verbosity)
