"""A study of any LightningModule: the options of its trials, and the objects made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jsonargparse import Namespace

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Ending, Experiment
from lightning_bge.hpo.finish.module_results import finish_module_study
from lightning_bge.hpo.ranking import score_of
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.callback_kinds import NOT_IN_TRIALS, acting_callbacks
from lightning_bge.runtime.dotted_config import comparable, with_overrides

OURS = "needs BGEClassifier and TextDataModule"


@dataclass(frozen=True)
class LoggedMetric:
    """The metric of a run of any LightningModule, and which epoch's value is its score.

    Attributes:
        metric: the name under which the module logs it in validation.
        mode: max or min, whichever is better; null: min for a name that ends with loss.
        objective: the score of a run is the value of its `best` or of its `last` epoch.
        patience: stop after this many epochs without a better value; null: never stop early.
        min_delta: a value counts as better for `patience` where it is better by more than this.

    Raises:
        ConfigError: a value is out of range, or it is not known what is better.
    """

    metric: str = "val_loss"
    mode: Literal["max", "min"] | None = None
    objective: Literal["best", "last"] = "best"
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min", None):
            raise ConfigError(f"monitor.mode: expected max, min or null, got {self.mode!r}")
        if self.mode is None and not self.metric.endswith("loss"):
            raise ConfigError(f"monitor.mode: expected max or min for the metric {self.metric}, got null. Set it")
        if self.objective not in ("best", "last"):
            raise ConfigError(f"monitor.objective: expected best or last, got {self.objective!r}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"monitor.patience: expected 1 or more, or null, got {self.patience}")
        if not self.min_delta >= 0:
            raise ConfigError(f"monitor.min_delta: expected 0 or more, got {self.min_delta}")

    @property
    def name(self) -> str:
        """The metric's name in files and messages."""
        return self.metric

    @property
    def logged(self) -> str:
        """The name under which it is logged."""
        return self.metric

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna names them."""
        return "maximize" if self.mode == "max" else "minimize"


@dataclass(frozen=True, kw_only=True)
class ModuleExperiment(Experiment):
    """As `Experiment`, of a module and a data module by the paths of their classes.

    A data module with the members `num_folds` and `select_fold(k)` is trained fold by fold: `select_fold` is called
    before `fit`, and the loaders that are made afterwards are those of fold k. Without them there is a single split.

    Attributes:
        create: makes fresh objects of the options, with all random number generators seeded.
        monitor: the metric of the study.
    """

    create: Callable[[Namespace], TrialSetup]
    monitor: LoggedMetric

    def build(self, overrides: dict[str, Any]) -> TrialSetup:
        """Fresh objects for a trial."""
        return self.create(with_overrides(self.config, overrides))

    def set_up(self) -> None:
        """Make the configured objects once, so that what is wrong with them is found before a study exists."""
        _ = self.num_folds

    @cached_property
    def num_folds(self) -> int:
        """That of the data module; 1 without one.

        Raises:
            ConfigError: it is no number of folds, or the folds can't be selected.
        """
        data = self.build({}).datamodule
        found = getattr(data, "num_folds", 1)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ConfigError(f"data: expected num_folds of {_name(data)} to be a number, 1 or more, got {found!r}")
        if found > 1 and not callable(getattr(data, "select_fold", None)):
            raise ConfigError(
                f"data: {_name(data)} has num_folds={found}, and no method select_fold(k). Add it: loaders that are "
                "made after its call are those of fold k"
            )
        return found

    @property
    def data_hash(self) -> str | None:
        """It is not known what such data are read from."""
        return None

    def identity(self, hpo: StudyConfig, space: Space) -> dict[str, Any]:
        """All options but those that are searched and those that change no result."""
        always_drawn = tuple(name for name in space if name not in space.when)
        options = comparable(self.plain(self.config), always_drawn)
        if "trainer.callbacks" in options:
            options["trainer.callbacks"] = acting_callbacks(options["trainer.callbacks"], NOT_IN_TRIALS)
        if hpo.reports_per_epoch > 1:
            options["hpo.val_check_interval"] = hpo.val_check_interval
        return options | {"monitor.metric": self.monitor.name, "num_folds": self.num_folds}

    def notes(self, hpo: StudyConfig) -> list[str]:
        """What such a study does not do."""
        return [f"no refit and no export at the end, which {OURS}: train with best.yaml"]

    def parts_of_objective(self, hpo: StudyConfig) -> dict[str, Any]:
        """How checkpoints are read."""
        return {"weights_only": hpo.weights_only}

    def trial_files(self, queue: StudyQueue) -> TrialFiles:
        """Checkpoints of trials alone: such modules keep no predictions."""
        return TrialFiles(checkpoints=queue.checkpoints)

    def finish(self, queue: StudyQueue, objective: Objective, ending: Ending) -> dict[str, Any]:
        """Write the results: see `finish_module_study`."""
        return finish_module_study(
            queue.study,
            queue.run_dir,
            build=self.build,
            monitor=self.monitor,
            replicates=ending.replicates,
            baseline=None if ending.baseline is None else score_of(ending.baseline[0]),
        )


def without_refit(hpo: StudyConfig) -> StudyConfig:
    """The options of a study of a module that is not ours, which is not trained once more at the end.

    Raises:
        ConfigError: an option needs the texts, the predictions or the export of `BGEClassifier`.
    """
    defaults = StudyConfig()
    for name in ("calibration", "ensemble", "refit_val_file", "encoder_cache_gb", "outer_folds"):
        if getattr(hpo, name) != getattr(defaults, name):
            expected = str(getattr(defaults, name)).lower().replace("none", "null")
            raise ConfigError(
                f"hpo.{name}: expected {expected} for a module of another project, got {getattr(hpo, name)}: it {OURS}"
            )
    if hpo.reports_per_epoch > 1 and hpo.pruner.name == "asha":
        raise ConfigError(
            f"hpo.val_check_interval: expected 1 for a module of another project, got {hpo.val_check_interval}: a "
            "trial that asha pauses within an epoch could not go on with the rows that are left. Set it to 1, or "
            "hpo.pruner.name to median"
        )
    if hpo.cost == "predict_seconds":
        raise ConfigError(
            "hpo.cost: expected train_seconds or null for a module of another project, got predict_seconds: the "
            "number of its validation rows is not known"
        )
    return replace(hpo, refit=False)


def _name(data: Any) -> str:
    return type(data).__name__
