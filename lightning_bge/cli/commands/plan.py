"""`lightning-bge plan`: the hours of a search, before it is started."""

from __future__ import annotations

import time
from dataclasses import replace

from lightning_bge.advisor.plan.console import describe_plan
from lightning_bge.advisor.plan.plan import Known, PlanConfig, Search, make_plan
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.search_options import (
    add_hpo_and,
    check_one_device,
    own_options,
    writable,
)
from lightning_bge.hpo.space.parameter_sets import parameter_sets_to_check
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.study import quiet_optuna
from lightning_bge.runtime.run_folder import write_json

DESCRIPTION = """Estimate how many hours a search takes, from a short calibration on this machine: with a range, at each
optimization level, with what-ifs, and for a deadline."""


def run(args: list[str]) -> None:
    """Print the plan, and write it as JSON where asked."""
    quiet_optuna()
    process_s = time.process_time()
    cli = BGECLI("plan", args, description=DESCRIPTION, add_arguments=add_hpo_and(PlanConfig))
    options, hpo = own_options(cli, PlanConfig), cli.config_init.hpo
    json = writable(options.json)
    check_one_device(cli, "A search trains on one device; plan several workers with --workers")
    if options.trials is not None:
        hpo = replace(hpo, n_trials=options.trials)
    config, space = cli.config, parse_space(hpo.space)
    with running(cli.trainer):
        experiment = cli.experiment
        experiment.check_space(hpo, space)
        cli.datamodule.setup("fit")
        init = cli.config_init
        checks = sum(1 for _ in parameter_sets_to_check(space, config.get)) + len(hpo.enqueue)
        times = Known(experiment.most_epochs(space), config.trainer.max_epochs, process_s, checks)
        search = Search(
            experiment.build,
            hpo,
            init.monitor,
            init.compile,
            cli.datamodule,
            cli.run_dir,
            experiment.encoder_cache(hpo),
            times,
        )
        found = make_plan(search, options)
    print(describe_plan(found))
    if json is not None:
        write_json(json, found.as_dict())
