"""A study of `BGEClassifier` and `TextDataModule`: the options of its trials, and the objects made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MemoryConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import OUTER_FOLDS, PREDICTIONS, StudyConfig
from lightning_bge.hpo.evaluation.nested import finish_nested
from lightning_bge.hpo.experiment import Ending, Experiment
from lightning_bge.hpo.finish.refit import check_end
from lightning_bge.hpo.finish.results import finish_study
from lightning_bge.hpo.identity import text_identity
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.space.comparable import check_searchable, check_validation
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.losses import Loss
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.tried_classes import ThreeLayers, try_classes
from lightning_bge.runtime.dotted_config import with_overrides

TRIED_STEPS = 10  # of a schedule, before a study starts
# options of `hpo` that the inner studies of a nested cross-validation have: each is scored, its gain is not asked for
FOR_INNER_STUDIES: dict[str, Any] = {"outer_folds": None, "refit": True, "baseline": False}


def inner_options(hpo: Mapping[str, Any], run_dir: Path, fold: int) -> dict[str, Any]:
    """Options of `hpo` of the inner study of an outer fold, with a name and a location of files of its own.

    Args:
        hpo: the options of the whole run.
        run_dir: its folder.
        fold: number of the outer fold.
    """
    storage, study_name, files = hpo["storage"], hpo["study_name"], hpo["files"]
    name = None if storage is None else f"{study_name or run_dir.resolve().name}-outer-fold-{fold}"
    inner = None if files is None else f"{files.rstrip('/')}/{OUTER_FOLDS}/{fold}"
    return {**FOR_INNER_STUDIES, "study_name": name, "files": inner}


@dataclass(frozen=True, kw_only=True)
class TextExperiment(Experiment):
    """As `Experiment`, of texts: the command line's, or that of `tune`.

    Attributes:
        create: makes fresh objects of such options, with the data set up for `fit`.
        datamodule: made of `config`.
        monitor: the metric of the study.
        compile: when layers are compiled.
        memory: how the micro-batch size is found, and how much memory this process may use.
    """

    create: Callable[[Namespace], TextTrialSetup]
    datamodule: TextDataModule
    monitor: MonitorConfig
    compile: CompileConfig
    memory: MemoryConfig

    def build(self, overrides: dict[str, Any]) -> TextTrialSetup:
        """Fresh objects for a trial: the options, with hyperparameters that passed `check`."""
        return self.create(with_overrides(self.config, overrides))

    def set_up(self) -> None:
        """Read and tokenize the data."""
        self.datamodule.setup("fit")

    @property
    def num_folds(self) -> int:
        """Number of folds; 1 is a single split."""
        return self.datamodule.num_folds

    @property
    def data_hash(self) -> str | None:
        """Of the training file's content."""
        return self.datamodule.data_hash

    def check(self, overrides: dict[str, Any], where: str = "hpo.space") -> None:
        """As `Experiment.check`; or other rows, labels or groups are validated on with the values."""
        super().check(overrides, where)
        setup = self.build(overrides)
        _check_classes(setup)
        found = setup.datamodule.validation_hash
        check_validation(found, self.datamodule.validation_hash, overrides, where)

    def check_space(self, hpo: StudyConfig, space: Space) -> None:
        """As `Experiment.check_space`; nor may it change what the score means."""
        check_searchable(space, self.config.get, self.monitor.name)
        super().check_space(hpo, space)

    def check_end(self, hpo: StudyConfig, space: Space) -> None:
        """Check the options of the study's end: see `check_end` of `finish.refit`."""
        check_end(hpo, self.datamodule, lambda: self.setups_of_models(space))

    def identity(self, hpo: StudyConfig, space: Space) -> dict[str, Any]:
        """The options that must be equal for trials to be comparable, and what is read, by content."""
        return text_identity(self, hpo, space)

    def parts_of_objective(self, hpo: StudyConfig) -> dict[str, Any]:
        """Compilation, and the encoder cache."""
        return {"compile": self.compile, "encoder": self.encoder_cache(hpo)}

    def trial_files(self, queue: StudyQueue) -> TrialFiles:
        """Checkpoints, and the predictions of all validations."""
        return TrialFiles(
            out_of_fold=queue.files / "oof",
            checkpoints=queue.checkpoints,
            predictions=queue.files / PREDICTIONS,
            predictions_limit=round(queue.config.predictions_gb * 2**30),
        )

    def finish(self, queue: StudyQueue, objective: Objective, ending: Ending) -> dict[str, Any]:
        """Judge the study, refit its winner and export it: see `finish_study`."""
        outer_folds, schema = queue.config.outer_folds, self.datamodule.schema
        assert schema is not None
        nested = None if outer_folds is None else finish_nested(queue.run_dir, outer_folds, schema, self.monitor.name)
        return finish_study(
            queue.study,
            queue.run_dir,
            build=self.build,
            monitor=self.monitor,
            epochs=ending.epochs,
            config=queue.config,
            replicates=ending.replicates,
            baseline=ending.baseline,
            nested=nested,
            request=objective.request,
        )

    def setups_of_models(self, space: Space) -> Iterator[TextTrialSetup]:
        """Fresh objects for each model that trials may have, one after the other."""
        name = "model.name_or_path"
        for value in space[name].choices if name in space else (self.config[name],):  # type: ignore[attr-defined]
            yield self.build({name: value})

    def of_outer_fold(self, fold: int, n_outer_folds: int, run_dir: Path) -> TextExperiment:
        """The same experiment on the rows outside of an outer fold, whose own rows are the test rows.

        Args:
            fold: number of the outer fold, from 0.
            n_outer_folds: how many there are.
            run_dir: folder of its study.

        Raises:
            ConfigError: there is a validation file.
            DataError: the rows can't be split so.
        """
        split = {"data.split.outer_folds": n_outer_folds, "data.split.outer_fold": fold}
        config = with_overrides(self.config, {**split, "data.test_file": None})
        config["run_dir"] = str(run_dir)

        def plain(config: Namespace) -> dict[str, Any]:
            found = self.plain(config)
            hpo = found["hpo"]
            # what a worker that joins it reads
            return {**found, "hpo": {**hpo, **inner_options(hpo, self.run_dir, fold)}}

        datamodule = self.create(config).datamodule
        return replace(self, config=config, plain=plain, datamodule=datamodule, run_dir=run_dir)

    def encoder_cache(self, hpo: StudyConfig) -> EncoderCache:
        """What the study loads its encoders with."""
        granted = self.memory.limit_gb
        return EncoderCache(hpo.encoder_cache_bytes, None if granted is None else round(granted * 2**30))


def _check_classes(setup: TextTrialSetup) -> None:
    """Try what a trial names by the path of a class."""
    model, data = setup.model, setup.datamodule
    assert data.schema is not None
    if model.loss_config.class_path is not None:
        Loss(model.loss_config, data.schema.task, data.schema.num_outputs)
    steps = TRIED_STEPS
    try_classes(ThreeLayers(), model.optimizer_config, model.schedule_config, total_steps=steps, steps=steps)
