"""`lightning-bge hpo`: a study with Optuna, its refit and its export."""

from dataclasses import replace
from functools import partial

from lightning_bge.advisor.report.report import write_report
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.cli.search_options import check_one_device, options_of_study, starting_again, study_cli
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.finish.published import fetch_results, publish_report
from lightning_bge.hpo.finish.results import describe_study, is_current
from lightning_bge.hpo.launchers.launcher import Launcher
from lightning_bge.hpo.launchers.local import LocalLauncher, slots
from lightning_bge.hpo.launchers.pool import WorkerPool
from lightning_bge.hpo.launchers.ray import RayLauncher
from lightning_bge.hpo.outer_folds import Found, run_studies
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.run import check_study, prepare_study, run_hpo
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.draw import n_parameter_sets
from lightning_bge.hpo.storage.files import study_files
from lightning_bge.hpo.study import study_storage
from lightning_bge.hpo.tracked_study import attach_report
from lightning_bge.preflight import preflight, preflight_module
from lightning_bge.runtime.run_folder import create_run_dir, read_json

DESCRIPTION = """Search for the best hyperparameters over folds, prune bad trials, refit the best ones on all rows of
the training file, and export the model. An interrupted study continues when the same command is run again. With
--hpo.workers N processes of this machine share the study, with --launcher ray those of a Ray cluster;
`lightning-bge worker RUN` joins it from another terminal."""


def run(args: list[str]) -> None:
    """Run the study of the run folder, or what is missing of it."""
    quiet_optuna()
    cli = study_cli(args, description=DESCRIPTION)
    with starting_again(), running(cli.trainer):
        if cli.config_init.launcher == "ray":
            check_one_device(cli, "With --launcher ray each trial has one device, and ray.num_gpus says which part")
        hpo = options_of_study(cli)
        if isinstance(cli, BGECLI):
            preflight("hpo", cli.experiment, hpo)
        else:
            preflight_module("hpo", cli.run_dir, cli.trainer_arguments, hpo)
        launcher = _launcher(cli)
        run = run_hpo if launcher is None else partial(_run_pool, launcher)
        study, summary = run_studies(cli.experiment, hpo, run=run)
        if summary is not None:
            report = write_report(cli.run_dir)
            publish_report(report, cli.config_init.hpo.files)
            attach_report(study, cli.config_init.hpo, cli.run_dir, summary, report)
            print(f"  {report.name:<14}the whole study on one page, for a browser")


def _launcher(cli: BGECLI | ModuleCLI) -> Launcher | None:
    """What starts the study's workers; None: this process is the only one."""
    if cli.config_init.launcher == "ray":
        return RayLauncher(cli.config_init.ray, cli.config_init.hpo)
    ranks = cli.trainer.world_size
    found = slots(cli.config_init.hpo, ranks)
    return LocalLauncher(found) if len(found) > 1 or ranks > 1 else None


def _run_pool(launcher: Launcher, experiment: Experiment, hpo: StudyConfig, *, joins: bool) -> Found:
    """As `run_hpo`, in processes of their own."""
    space, steps = check_study(experiment, hpo)
    run_dir = create_run_dir(experiment.run_dir)
    place = study_storage(run_dir, hpo)
    study = prepare_study(experiment, hpo, space, steps, place, joins=joins)
    progress = Progress(
        replace(hpo, n_trials=n_parameter_sets(hpo.n_trials, space)), experiment.monitor.name, steps.total
    )
    WorkerPool(study, place, progress, launcher, hpo.timeout).run()
    if (files := study_files(hpo.files, run_dir)) != run_dir:
        fetch_results(files, run_dir)
    summary = read_json(run_dir / "summary.json")
    if summary is None or not is_current(summary, study):
        print("this command has nothing more to do, and other processes go on with the study: the last one ends it")
        return study, None
    print(describe_study(run_dir, summary, files))
    return study, summary
