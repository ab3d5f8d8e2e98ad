"""What a plan needs to know of the trials of a study: of texts, or of any LightningModule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.plan.cost_model import ParameterSets
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.finish.module_results import finish_module_study
from lightning_bge.hpo.finish.results import finish_study
from lightning_bge.hpo.module_experiment import ModuleExperiment
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.parameter_sets import parameter_sets_to_check
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.objective import TrialFiles
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.hpo.trial.setup import Build, TrialSetup
from lightning_bge.hpo.trial.text_setup import TextBuild, TextTrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.runtime.dotted_config import configured_value

VALIDATED = 64  # rows of a short validation, or those of two batches
VALIDATED_BATCHES = 2  # of a short validation, where the number of rows of a batch is not known


@dataclass(frozen=True)
class DataSize:
    """The work and the steps of the planned study: tokens, or batches where those of other projects are trained.

    Attributes:
        train: of an epoch, mean over the folds.
        validation: of a validation, mean over the folds.
        all: of all rows.
        steps: optimizer steps of an epoch.
    """

    train: float
    validation: float
    all: float
    steps: int

    @classmethod
    def of(cls, data: TextDataModule) -> DataSize:
        """Of a data module that is set up, over all its folds."""
        lengths = data.lengths("train")
        train, validation = [], []
        for fold in range(data.num_folds):
            data.select_fold(fold)
            train.append(lengths[data.train_rows].sum())
            validation.append(data.lengths("val")[data.val_rows].sum())
        steps = math.ceil(len(data.train_rows) / data.rows_per_step)
        return cls(float(np.mean(train)), float(np.mean(validation)), float(lengths.sum()), steps)


class PlannedTrials(ABC):
    """The trials of a study, of which a plan measures shortened ones.

    Attributes:
        build: makes the objects of a trial in full size.
        monitor: the metric of shortened trials.
        compile: when layers are compiled; None: never.
        encoder: loads the encoders.
        val_fraction: the part of the rows that a single split validates on; None: the study has no such option.
        without_packing: options with which a trial trains on padded batches; empty: it does so in any case.
    """

    build: Build
    monitor: Monitor
    compile: CompileConfig | None
    encoder: EncoderCache
    val_fraction: float | None = None
    without_packing: dict[str, Any]

    @staticmethod
    def of(experiment: Experiment, hpo: StudyConfig) -> PlannedTrials:
        """Those of an experiment whose data are set up."""
        if isinstance(experiment, TextExperiment):
            return TextTrials(experiment, hpo)
        assert isinstance(experiment, ModuleExperiment)
        return ModuleTrials(experiment)

    @abstractmethod
    def builds_at_start(self, sets: ParameterSets) -> int:
        """How often a study makes the objects of a trial before it begins one."""

    @abstractmethod
    def work(self, batch: Any) -> int:
        """What the seconds of a batch are proportional to."""

    @abstractmethod
    def limits(self, setup: TrialSetup, steps: int, epochs: int) -> dict[str, Any]:
        """Arguments of a trainer with epochs of so many steps, and with short validations; prepares the setup."""

    @abstractmethod
    def size(self, params: dict[str, Any]) -> DataSize:
        """Of a trial in full size."""

    @abstractmethod
    def files(self, folder: Path) -> TrialFiles:
        """What trials leave on the disk."""

    @abstractmethod
    def finish(self, study: Any, folder: Path, build: Build, epochs: int, config: StudyConfig) -> None:
        """End a study of shortened trials as the planned one ends."""

    def test_work(self) -> int:
        """Of the test file, after `finish`; 0 if it is not scored."""
        return 0


class TextTrials(PlannedTrials):
    """Trials of `BGEClassifier`: their seconds are proportional to the tokens of their batches, without padding.

    Args:
        experiment: makes their objects.
        hpo: options of the study.
    """

    def __init__(self, experiment: TextExperiment, hpo: StudyConfig) -> None:
        self.build: TextBuild = experiment.build
        # other metrics may be NaN where few rows miss a class
        self.monitor = MonitorConfig("loss", objective=experiment.monitor.objective)
        self.compile = experiment.compile
        self.encoder = experiment.encoder_cache(hpo)
        self.val_fraction = experiment.datamodule.split.val_fraction
        self.without_packing = {"model.attention": "padded"}
        self._data, self._configured = experiment.datamodule, partial(configured_value, experiment.config)

    def builds_at_start(self, sets: ParameterSets) -> int:
        """For each end of the search space, and each enqueued parameter set."""
        return sum(1 for _ in parameter_sets_to_check(sets.space, self._configured)) + sets.enqueued

    def work(self, batch: Any) -> int:
        """Its tokens."""
        return int(batch.tokens)

    def limits(self, setup: TrialSetup, steps: int, epochs: int) -> dict[str, Any]:
        """Few rows are validated on, also where folds are whole."""
        assert isinstance(setup, TextTrialSetup)
        data = self._data = setup.datamodule
        limits = {"limit_train_batches": steps, "limit_test_batches": 1, "max_epochs": epochs}
        if data.folds:
            data.limit_validation(max(VALIDATED, 2 * data.rows_per_step))
        else:
            limits["limit_val_batches"] = 1
        return limits

    def size(self, params: dict[str, Any]) -> DataSize:
        """Of all folds."""
        return DataSize.of(self.build(params).datamodule)

    def files(self, folder: Path) -> TrialFiles:
        """Checkpoints, and out-of-fold predictions."""
        return TrialFiles(folder / "oof", folder / CHECKPOINTS)

    def finish(self, study: Any, folder: Path, build: Build, epochs: int, config: StudyConfig) -> None:
        """With the refit, the export and the test file."""
        finish_study(study, folder, build=build, monitor=self.monitor, epochs=epochs, config=config)  # type: ignore[arg-type]

    def test_work(self) -> int:
        """Tokens of the test file."""
        return 0 if self._data.test_file is None else int(self._data.lengths("test").sum())


class ModuleTrials(PlannedTrials):
    """Trials of any module: their seconds are proportional to the number of their batches.

    Args:
        experiment: makes their objects.
    """

    def __init__(self, experiment: ModuleExperiment) -> None:
        self.build = experiment.build
        self.monitor = replace(experiment.monitor, patience=None)
        self.compile, self.encoder, self.without_packing = None, EncoderCache(), {}

    def builds_at_start(self, sets: ParameterSets) -> int:
        """Once, for the number of folds."""
        return 1

    def work(self, batch: Any) -> int:
        """One batch."""
        return 1

    def limits(self, setup: TrialSetup, steps: int, epochs: int) -> dict[str, Any]:
        """At least one whole step."""
        return {
            "limit_train_batches": max(steps, setup.make_trainer(callbacks=[]).accumulate_grad_batches),
            "limit_val_batches": VALIDATED_BATCHES,
            "val_check_interval": 1.0,
            "max_epochs": epochs,
        }

    def size(self, params: dict[str, Any]) -> DataSize:
        """Of the first fold, with which the others are taken to agree.

        Raises:
            ConfigError: a loader does not know its length, and no limit is set.
        """
        setup = self.build(params)
        setup.begin_fold(0, ())
        trainer = setup.make_trainer(callbacks=[StopAtStart()])
        trainer.fit(setup.model, datamodule=setup.datamodule)
        train, validation = float(trainer.num_training_batches), math.fsum(trainer.num_val_batches)
        for name, batches in (("train", train), ("val", validation)):
            if math.isinf(batches):
                raise ConfigError(
                    f"trainer.limit_{name}_batches: expected a number of batches, as a loader does not know its "
                    f"length, got {getattr(trainer, f'limit_{name}_batches')}. Set it, in hpo as well"
                )
        return DataSize(train, validation, train, math.ceil(train / trainer.accumulate_grad_batches))

    def files(self, folder: Path) -> TrialFiles:
        """Checkpoints alone."""
        return TrialFiles(checkpoints=folder / CHECKPOINTS)

    def finish(self, study: Any, folder: Path, build: Build, epochs: int, config: StudyConfig) -> None:
        """Nothing is trained."""
        finish_module_study(study, folder, build=build, monitor=self.monitor, replicates=None, baseline=None)


class StopAtStart(Callback):
    """Ends a training as soon as its loaders are made."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No batch is trained on."""
        trainer.should_stop = True
