"""A study, and before it the inner studies of its nested cross-validation, where one is asked for."""

import time
from dataclasses import replace
from typing import Any, Protocol

import optuna
from jsonargparse import Namespace

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.journal import shared_storage_of
from lightning_bge.hpo.analysis.winner import describe_price
from lightning_bge.hpo.config import OUTER_FOLDS, StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.run import check_study, prepare_study, run_hpo
from lightning_bge.hpo.study import study_storage
from lightning_bge.hpo.text_experiment import TextExperiment, inner_options
from lightning_bge.runtime.run_folder import create_run_dir

Found = tuple[optuna.Study, dict[str, Any] | None]


class RunStudy(Protocol):
    """Runs one study to its end: `run_hpo`, or something with its arguments and its result."""

    def __call__(self, experiment: Experiment, hpo: StudyConfig, *, joins: bool) -> Found:
        """Run what is missing of the study."""


def run_studies(experiment: Experiment, hpo: StudyConfig, *, run: RunStudy = run_hpo, joins: bool = False) -> Found:
    """Run the study of a folder; with `hpo.outer_folds` after an inner study for each outer fold.

    An inner study is a run folder of its own, `outer_folds/0` and so on, on the rows outside of its outer fold. It
    is continued like any study, and one that has finished trains nothing more. Where the time of a call is over while
    other processes go on with an inner study, this one leaves the rest to them.

    Args:
        experiment: what the studies vary.
        hpo: their options. Of `hpo.timeout` each study has an equal part, and what earlier ones have left of theirs.
        run: runs one study.
        joins: the study is there, and its options are not written again.

    Returns:
        The study on all rows, and the content of its `summary.json`; None while other processes still run trials.

    Raises:
        UserError: as `run_hpo`, or the rows can't be split into outer folds.
    """
    experiment, hpo = _with_name(experiment, hpo)
    if hpo.outer_folds is None:
        return run(experiment, hpo, joins=joins)
    assert isinstance(experiment, TextExperiment)  # no other one has outer folds
    inner = _inner_experiments(experiment, hpo.outer_folds)
    space, steps = check_study(experiment, hpo)
    create_run_dir(experiment.run_dir)
    study = prepare_study(experiment, hpo, space, steps, study_storage(experiment.run_dir, hpo), joins=joins)
    if not joins:
        print(describe_price(hpo.outer_folds), flush=True)
    start, n_studies = time.monotonic(), hpo.outer_folds + 1
    for number, one in enumerate(inner):
        print(f"\nouter fold {number + 1} of {hpo.outer_folds}: {one.run_dir}", flush=True)
        timeout = _timeout(hpo.timeout, n_studies, number, time.monotonic() - start)
        options = inner_options(vars(hpo), experiment.run_dir, number)
        _, summary = run(one, replace(hpo, **options, timeout=timeout), joins=joins)
        if summary is None:
            return study, None
    print(f"\nthe final study, on all rows: {experiment.run_dir}", flush=True)
    timeout = _timeout(hpo.timeout, n_studies, n_studies - 1, time.monotonic() - start)
    return run(experiment, replace(hpo, timeout=timeout), joins=True)


def _with_name(experiment: Experiment, hpo: StudyConfig) -> tuple[Experiment, StudyConfig]:
    """The same with the name that the study has in a storage, so that a run folder that is renamed keeps its study."""
    if hpo.storage is None or hpo.study_name is not None:
        return experiment, hpo
    known = shared_storage_of(experiment.run_dir)
    name = experiment.run_dir.resolve().name if known is None else known[1]

    def plain(config: Namespace) -> dict[str, Any]:
        found = experiment.plain(config)
        return {**found, "hpo": {**found["hpo"], "study_name": name}}

    return replace(experiment, plain=plain), replace(hpo, study_name=name)


def _inner_experiments(experiment: TextExperiment, n_outer_folds: int) -> list[TextExperiment]:
    data = experiment.datamodule
    if isinstance(experiment.monitor.metric, dict):
        raise ConfigError(
            f"hpo.outer_folds: expected null with a metric by class_path, got {n_outer_folds}: the interval needs one "
            "with a name. Set monitor.metric to such a one, or hpo.outer_folds to null"
        )
    if data.val_file is not None:
        raise ConfigError(
            f"hpo.outer_folds: expected null with data.val_file, got {n_outer_folds}: the validation rows would be the "
            "same in each inner study. Leave out data.val_file, and add its rows to data.train_file; or set "
            "hpo.outer_folds to null, and data.test_file to rows of which nothing is chosen"
        )
    if data.split.outer_fold is not None:
        raise ConfigError(
            f"hpo.outer_folds: expected null with data.split.outer_fold={data.split.outer_fold}, got {n_outer_folds}. "
            "Leave out data.split.outer_fold and data.split.outer_folds, which hpo.outer_folds sets"
        )
    folder = experiment.run_dir / OUTER_FOLDS
    return [experiment.of_outer_fold(k, n_outer_folds, folder / str(k)) for k in range(n_outer_folds)]


def _timeout(total: float | None, n_studies: int, done: int, elapsed: float) -> float | None:
    """Seconds of the next study: an equal part of all, or of what is left where that is more."""
    return None if total is None else max(total / n_studies, (total - elapsed) / (n_studies - done))
