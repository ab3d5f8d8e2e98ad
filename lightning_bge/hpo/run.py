"""A whole study, for the command line and for Python: its trials, seed replicates, refit and export."""

import time
from typing import Any

import optuna

from lightning_bge.hpo.config import BEST, StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.forecast.preview import describe_pruner
from lightning_bge.hpo.results import describe_study, finish_study
from lightning_bge.hpo.seed_replicates import run_seed_replicates
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, others_running, run_study
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.models.metrics import metric_direction
from lightning_bge.runtime.dotted_config import comparable
from lightning_bge.runtime.run_folder import create_run_dir, record_run


def run_hpo(experiment: Experiment, hpo: StudyConfig) -> tuple[optuna.Study, dict[str, Any] | None]:
    """Run the study of a folder, or what is missing of it, with a printed line after each trial and a summary.

    Returns:
        The study, and the content of `summary.json`; None while other processes still run trials: the last writes it.

    Raises:
        UserError: options, data or the folder's content are wrong, or no trial ran to its end.
    """
    space = parse_space(hpo.space)
    experiment.check_space(hpo, space)
    data = experiment.datamodule
    data.setup("fit")
    steps = Steps(data.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
    run_dir = create_run_dir(experiment.run_dir)
    _print_head(experiment, hpo, steps)
    direction = metric_direction(str(experiment.monitor.metric))
    study = open_study(run_dir, hpo, direction, steps, _comparable_options(experiment, hpo, space))
    since = time.monotonic()
    record_run(run_dir, experiment.plain(experiment.config), data.data_hash)
    objective = Objective(
        build=experiment.build,
        space=space,
        monitor=experiment.monitor,
        steps=steps,
        files=TrialFiles(out_of_fold=run_dir / "oof", paused=run_dir / "paused"),
        n_trials=hpo.n_trials,
        compile=experiment.compile,
        encoder=experiment.encoder_cache(hpo),
        cost=hpo.cost,
    )
    run_study(study, objective, hpo, str(experiment.monitor.metric), steps.total, objective.files.paused)
    if others_running(study):
        print("other processes are still running trials of this study: the last of them ends it")
        return study, None
    return study, _finish(experiment, hpo, study, objective, since)


def _print_head(experiment: Experiment, hpo: StudyConfig, steps: Steps) -> None:
    split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
    monitor = experiment.monitor
    print(
        f"study {experiment.run_dir.name}: {hpo.n_trials} trials, {split}, at most {steps.epochs} epochs each; "
        f"metric: {monitor.metric} of the {monitor.objective} epoch, mean over the folds"
    )
    print(describe_pruner(hpo.pruner, hpo.n_trials, steps))
    if hpo.n_seed_replicates:
        print(f"seed replicates at the end: {hpo.n_seed_replicates} of each of the best trials, up to {BEST}")


def _comparable_options(experiment: Experiment, hpo: StudyConfig, space: Space) -> dict[str, Any]:
    """The options that must be equal for trials to be comparable; a searched one is only among them if conditional."""
    always_drawn = tuple(name for name in space if name not in space.when)
    options = comparable(experiment.plain(experiment.config), always_drawn)
    options |= {"data_hash": experiment.datamodule.data_hash, "folds_hash": experiment.datamodule.folds_hash}
    return options | ({"hpo.val_check_interval": hpo.val_check_interval} if hpo.reports_per_epoch > 1 else {})


def _finish(
    experiment: Experiment, hpo: StudyConfig, study: optuna.Study, objective: Objective, since: float
) -> dict[str, Any] | None:
    """Seed replicates, refit, export and results; None: other processes still run some of the seed replicates."""
    config, metric = experiment.config, str(experiment.monitor.metric)
    replicates = run_seed_replicates(study, objective, hpo, metric=metric, seed=config.seed_everything, since=since)
    if replicates is not None and replicates.elsewhere:
        print(
            f"other processes are still running {replicates.elsewhere} of the seed replicates: the last of them ends "
            "the study"
        )
        return None
    objective.encoder.clear()
    summary = finish_study(
        study,
        experiment.run_dir,
        build=experiment.build,
        monitor=experiment.monitor,
        # the epochs of a trial that has not drawn a number of them
        epochs=config["trainer.max_epochs"] if "trainer.max_epochs" in objective.space.when else objective.steps.epochs,
        refit=hpo.refit,
        replicates=replicates,
    )
    print(describe_study(experiment.run_dir, summary))
    return summary
