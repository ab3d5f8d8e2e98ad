"""What a study varies: the options of its trials, and the objects that are made of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MemoryConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import OUTER_FOLDS, StudyConfig
from lightning_bge.hpo.space.comparable import check_searchable, check_validation
from lightning_bge.hpo.space.parameter_sets import (
    complete_parameter_set,
    ends,
    parameter_sets_to_check,
    parse_enqueued,
)
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.trial.objective import TrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.losses import Loss
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.tried_classes import ThreeLayers, try_classes
from lightning_bge.runtime.dotted_config import check_option, configured_value, with_overrides
from lightning_bge.runtime.option_errors import describe_option_error

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
class Experiment:
    """The options of a study's trials, and how objects are made of them: the command line's, or those of `tune`.

    Attributes:
        config: all options by their dotted names: of model, data and trainer, and `seed_everything`.
        create: makes fresh objects of such options, with the data set up for `fit`.
        validate: raises TypeError, ValueError, KeyError or `ConfigError` where an option has a wrong value.
        plain: turns such options into plain data, as it is written into the run's `config.yaml`.
        datamodule: made of `config`.
        monitor: the metric of the study.
        compile: when layers are compiled.
        memory: how the micro-batch size is found, and how much memory this process may use.
        run_dir: the run's folder, which may not exist yet.
    """

    config: Namespace
    create: Callable[[Namespace], TrialSetup]
    validate: Callable[[Namespace], Any]
    plain: Callable[[Namespace], dict[str, Any]]
    datamodule: TextDataModule
    monitor: MonitorConfig
    compile: CompileConfig
    memory: MemoryConfig
    run_dir: Path

    def build(self, overrides: dict[str, Any]) -> TrialSetup:
        """Fresh objects for a trial: the options, with hyperparameters that passed `check`."""
        return self.create(with_overrides(self.config, overrides))

    def check(self, overrides: dict[str, Any], where: str = "hpo.space") -> None:
        """Raise `ConfigError`, which begins with `where`, if the options do not accept such values.

        Or if other rows, labels or groups are validated on with them: `datamodule` has to be set up.
        """
        try:
            self.validate(with_overrides(self.config, overrides))
        except (TypeError, ValueError, KeyError) as error:
            reason = describe_option_error(str(error))
            raise ConfigError(f"{where}: these options do not accept the values {overrides}: {reason}") from error
        setup = self.build(overrides)
        self._check_classes(setup)
        found = setup.datamodule.validation_hash
        check_validation(found, self.datamodule.validation_hash, overrides, where)

    def _check_classes(self, setup: TrialSetup) -> None:
        """Try what a trial names by the path of a class."""
        model, data = setup.model, setup.datamodule
        assert data.schema is not None
        if model.loss_config.class_path is not None:
            Loss(model.loss_config, data.schema.task, data.schema.num_outputs)
        steps = TRIED_STEPS
        try_classes(ThreeLayers(), model.optimizer_config, model.schedule_config, total_steps=steps, steps=steps)

    def check_space(self, hpo: StudyConfig, space: Space) -> None:
        """Try the ends of the search space and the enqueued parameter sets, before a study exists.

        Raises:
            ConfigError: an option does not exist, does not accept a value, or changes what the score means.
            UserError: the data are wrong.
        """
        enqueued = parse_enqueued(hpo.enqueue, space)
        check_searchable(space, self.config.get, self.monitor.name)
        for name in space:
            check_option(self.config, name)
        self.datamodule.setup("fit")
        configured = partial(configured_value, self.config)
        for values in parameter_sets_to_check(space, configured):
            self.check(values)
        for values in enqueued:
            self.check(complete_parameter_set(space, values, configured), "hpo.enqueue")

    def setups_of_models(self, space: Space) -> Iterator[TrialSetup]:
        """Fresh objects for each model that trials may have, one after the other."""
        name = "model.name_or_path"
        for value in space[name].choices if name in space else (self.config[name],):  # type: ignore[attr-defined]
            yield self.build({name: value})

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

    def of_outer_fold(self, fold: int, n_outer_folds: int, run_dir: Path) -> "Experiment":
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
