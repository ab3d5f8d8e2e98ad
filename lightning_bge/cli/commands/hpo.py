"""`lightning-bge hpo`: a study with Optuna, its refit and its export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_bge.advisor.report.report import write_report
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.search_options import add_hpo, check_one_device, starting_again
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.results import describe_study
from lightning_bge.hpo.run import check_study, prepare_study, run_hpo
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.draw import n_parameter_sets
from lightning_bge.hpo.worker_pool import WorkerPool, slots
from lightning_bge.runtime.run_folder import create_run_dir, read_json

DESCRIPTION = """Search for the best hyperparameters over folds, prune bad trials, refit the best ones on all rows of
the training file, and export the model. An interrupted study continues when the same command is run again. With
--hpo.workers N processes of this machine share the study; `lightning-bge worker RUN` joins it from another terminal."""


def run(args: list[str]) -> None:
    """Run the study of the run folder, or what is missing of it."""
    quiet_optuna()
    cli = BGECLI("hpo", args, description=DESCRIPTION, add_arguments=add_hpo)
    with starting_again(), running(cli.trainer):
        check_one_device(cli, "To use more, set hpo.workers: one process for each device shares the study")
        workers = slots(cli.config_init.hpo)
        if len(workers) == 1:
            _, summary = run_hpo(cli.experiment, cli.config_init.hpo)
        else:
            summary = _run_pool(cli, workers)
        if summary is not None:
            print(f"  {write_report(cli.run_dir).name:<14}the whole study on one page, for a browser")


def _run_pool(cli: BGECLI, workers: list[Any]) -> dict[str, Any] | None:
    hpo, experiment = cli.config_init.hpo, cli.experiment
    space, steps = check_study(experiment, hpo)
    run_dir: Path = create_run_dir(cli.run_dir)
    study = prepare_study(experiment, hpo, space, steps)
    progress = Progress(
        replace(hpo, n_trials=n_parameter_sets(hpo.n_trials, space)), str(experiment.monitor.metric), steps.total
    )
    WorkerPool(study, run_dir, hpo, progress, workers).run()
    summary = read_json(run_dir / "summary.json")
    if summary is not None:
        print(describe_study(run_dir, summary))
    return summary
