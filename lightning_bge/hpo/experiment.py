"""What a study varies: the options of its trials, and the objects that are made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from optuna.trial import FrozenTrial

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish.seed_replicates import SeedReplicates
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.space.parameter_sets import (
    complete_parameter_set,
    ends,
    parameter_sets_to_check,
    parse_enqueued,
)
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.dotted_config import check_option, configured_value, with_overrides
from lightning_bge.runtime.option_errors import describe_option_error


@dataclass(frozen=True)
class Ending:
    """What has been trained after the last trial of a study.

    Attributes:
        epochs: of a trial that has not drawn a number of them.
        replicates: results of the seed replicates.
        baseline: the trial of the configured options, and its steps.
    """

    epochs: int
    replicates: SeedReplicates | None = None
    baseline: tuple[FrozenTrial, Steps] | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """What a study varies: the options of its trials, of any LightningModule.

    Attributes:
        config: all options by their dotted names: of model, data and trainer, and `seed_everything`.
        validate: raises TypeError, ValueError, KeyError or `ConfigError` where an option has a wrong value.
        plain: turns such options into plain data, as it is written into the run's `config.yaml`.
        monitor: the metric of the study.
        run_dir: the run's folder, which may not exist yet.
    """

    config: Namespace
    validate: Callable[[Namespace], Any]
    plain: Callable[[Namespace], dict[str, Any]]
    monitor: Monitor
    run_dir: Path

    @abstractmethod
    def build(self, overrides: dict[str, Any]) -> TrialSetup:
        """Fresh objects for a trial: the options, with hyperparameters that passed `check`."""

    @abstractmethod
    def set_up(self) -> None:
        """Make the data ready, once."""

    @property
    @abstractmethod
    def num_folds(self) -> int:
        """Number of folds; 1 is a single split. After `set_up`."""

    @property
    @abstractmethod
    def data_hash(self) -> str | None:
        """Of the training data; None: it is not known."""

    def check_end(self, hpo: StudyConfig, space: Space) -> None:  # noqa: B027 - not each has an end
        """Check the options of the study's end before its first trial.

        Raises:
            ConfigError: an option does not go with the data, or with a model.
        """

    @abstractmethod
    def identity(self, hpo: StudyConfig, space: Space) -> dict[str, Any]:
        """The options that must be equal for trials to be comparable, by dotted names, as plain data."""

    @abstractmethod
    def parts_of_objective(self, hpo: StudyConfig) -> dict[str, Any]:
        """Arguments of `Objective`: what its trials share."""

    @abstractmethod
    def trial_files(self, queue: StudyQueue) -> TrialFiles:
        """What trials leave on the disk."""

    @abstractmethod
    def finish(self, queue: StudyQueue, objective: Objective, ending: Ending) -> dict[str, Any]:
        """Write the results of a study whose trials have ended; returns the content of `summary.json`."""

    def notes(self, hpo: StudyConfig) -> list[str]:
        """Lines to print before a study begins."""
        return []

    def configured(self, space: Space) -> dict[str, Any]:
        """The configured values of what is searched."""
        return {name: configured_value(self.config, name) for name in space}

    def check(self, overrides: dict[str, Any], where: str = "hpo.space") -> None:
        """Raise `ConfigError`, which begins with `where`, if the options do not accept such values."""
        try:
            self.validate(with_overrides(self.config, overrides))
        except (TypeError, ValueError, KeyError) as error:
            reason = describe_option_error(str(error))
            raise ConfigError(f"{where}: these options do not accept the values {overrides}: {reason}") from error

    def check_space(self, hpo: StudyConfig, space: Space) -> None:
        """Try the ends of the search space and the enqueued parameter sets, before a study exists.

        Raises:
            ConfigError: an option does not exist, or does not accept a value.
            UserError: the data are wrong.
        """
        enqueued = parse_enqueued(hpo.enqueue, space)
        for name in space:
            check_option(self.config, name)
        self.set_up()
        configured = partial(configured_value, self.config)
        for values in parameter_sets_to_check(space, configured):
            self.check(values)
        for values in enqueued:
            self.check(complete_parameter_set(space, values, configured), "hpo.enqueue")

    def most_epochs(self, space: Space) -> int:
        """The most epochs that any trial trains a fold for.

        Raises:
            ConfigError: there is no such number.
        """
        searched = ends(space["trainer.max_epochs"]) if "trainer.max_epochs" in space else ()
        if wrong := [value for value in searched if value is None or value < 1]:
            raise ConfigError(f"hpo.space.trainer.max_epochs: expected 1 or more, got {wrong[0]}")
        if searched and "trainer.max_epochs" not in space.when:
            return max(searched)
        configured = self.config["trainer.max_epochs"]
        if configured is None or configured < 1:
            raise ConfigError(f"trainer.max_epochs: a study needs 1 or more, got {configured}")
        return max([configured, *searched])
