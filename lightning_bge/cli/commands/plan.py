"""`lightning-bge plan`: the hours of a study, before it is started."""

import time

from lightning_bge.advisor.plan.config import PlanConfig
from lightning_bge.advisor.plan.plan import make_plan
from lightning_bge.cli.class_paths import names_a_class
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.cli.search_options import (
    add_hpo_and,
    check_one_device,
    options_of_study,
    own_options,
    write_output,
)
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.preflight import preflight, preflight_module

DESCRIPTION = """Estimate the hours of a study from a short measurement on this machine: with an interval, at each
optimization level, after changes of the study, and for a deadline."""


def run(args: list[str]) -> None:
    """Print the plan, and write it as JSON if asked."""
    quiet_optuna()
    process_s = time.process_time()
    kind = ModuleCLI if names_a_class(args) else BGECLI
    cli = kind("plan", args, description=DESCRIPTION, add_arguments=add_hpo_and(PlanConfig))
    options = own_options(cli, PlanConfig)
    check_one_device(cli, "A trial trains on one device; plan several workers with --workers")
    with running(cli.trainer, keeps=False):
        hpo = options_of_study(cli)
        if isinstance(cli, BGECLI):
            preflight("plan", cli.experiment, hpo, {"json": options.json})
        else:
            preflight_module("plan", cli.run_dir, cli.trainer_arguments, outputs={"json": options.json})
        plan = make_plan(cli.experiment, hpo, options, process_s)
    print(plan)
    write_output(options.json, plan.as_dict())
