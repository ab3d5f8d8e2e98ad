"""`lightning-bge hpo`: a study with Optuna, its refit and its export."""

from __future__ import annotations

import os
import sys
import time

from lightning_bge.advisor.report.report import write_report
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.run_record import record_run
from lightning_bge.cli.search_options import add_hpo, check_one_device, check_search, encoder_cache, most_epochs
from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.forecast.preview import describe_pruner
from lightning_bge.hpo.objective import Objective
from lightning_bge.hpo.results import describe_study, finish_study
from lightning_bge.hpo.seed_replicates import run_seed_replicates
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import MemoryKeptError, open_study, others_go_on, quiet_optuna, run_study
from lightning_bge.models.metrics import metric_direction
from lightning_bge.runtime.dotted_config import comparable
from lightning_bge.runtime.run_folder import create_run_dir

DESCRIPTION = """Search for the best hyperparameters over folds, prune bad trials, refit the best ones on all rows, and
export the model. An interrupted study continues when the same command is run again."""


def run(args: list[str]) -> None:
    """Run the study of the run folder, or what is missing of it."""
    quiet_optuna()
    cli = BGECLI("hpo", args, description=DESCRIPTION, add_arguments=add_hpo)
    try:
        with running(cli.trainer):
            _hpo(cli)
    except MemoryKeptError as error:
        print(f"lightning-bge: {error}. The process starts itself again", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _hpo(cli: BGECLI) -> None:
    check_one_device(
        cli,
        "To use more, start this command once for each device, with its own CUDA_VISIBLE_DEVICES and the same "
        "--run_dir: these processes share the study",
    )
    hpo, monitor, config, datamodule = cli.config_init.hpo, cli.config_init.monitor, cli.config, cli.datamodule
    space = parse_space(hpo.space)
    check_search(cli, hpo, space)
    epochs = most_epochs(config, space)
    datamodule.setup("fit")
    folds = datamodule.num_folds
    run_dir = create_run_dir(cli.run_dir)
    split = "a single split" if folds == 1 else f"{folds} folds"
    print(f"study {run_dir.name}: {hpo.n_trials} trials, {split}, at most {epochs} epochs each; ", end="")
    print(f"judged by {monitor.metric} of the {monitor.objective} epoch, mean over the folds")
    steps = Steps(folds, epochs, hpo.reports_per_epoch)
    print(describe_pruner(hpo.pruner, hpo.n_trials, steps))
    if hpo.n_seed_replicates:
        print(f"seed replicates at the end: {hpo.n_seed_replicates} of each of the best trials, up to {BEST}")
    # a setting that is searched under a condition has its configured value in all other trials
    settings = comparable(cli.plain_config(), tuple(name for name in space if name not in space.when))
    settings |= {"data_hash": datamodule.data_hash, "folds_hash": datamodule.folds_hash}
    if hpo.reports_per_epoch > 1:
        settings["hpo.val_check_interval"] = hpo.val_check_interval
    direction = metric_direction(str(monitor.metric))
    study = open_study(run_dir, hpo, direction, steps, settings)
    since = time.monotonic()
    record_run(cli, run_dir, datamodule)
    encoder = encoder_cache(cli, hpo)
    paused_dir = run_dir / "paused"
    objective = Objective(
        build=cli.build,
        space=space,
        monitor=monitor,
        folds=folds,
        epochs=epochs,
        oof_dir=run_dir / "oof",
        n_trials=hpo.n_trials,
        compile=cli.config_init.compile,
        per_epoch=hpo.reports_per_epoch,
        encoder=encoder,
        cost=hpo.cost,
        paused_dir=paused_dir,
    )
    run_study(study, objective, hpo, str(monitor.metric), steps.total, paused_dir)
    if others_go_on(study):
        print("other processes still run trials of this study: the last of them ends it")
        return
    seed = config.seed_everything
    replicates = run_seed_replicates(study, objective, hpo, str(monitor.metric), steps.total, seed, since)
    if replicates is not None and replicates.elsewhere:
        found = f"other processes are running {replicates.elsewhere} of the seed replicates"
        print(f"{found}: the last of them ends the study")
        return
    encoder.let_go()
    # of a trial that has drawn no number of epochs
    usual = config.trainer.max_epochs if "trainer.max_epochs" in space.when else epochs
    summary = finish_study(study, cli.build, monitor, run_dir, usual, hpo.refit, replicates)
    print(describe_study(run_dir, summary))
    print(f"  {write_report(run_dir).name:<14}all of it to look at, in a browser; needs no network")
