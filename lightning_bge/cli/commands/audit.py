"""`lightning-bge audit`: which optimizations are in effect, and what could still be gained."""

import sys

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.bge_run import BGERun, audit_bge_run
from lightning_bge.advisor.audit.output import describe_audit, write_audit_page
from lightning_bge.advisor.audit.result import Audit, AuditConfig
from lightning_bge.cli.class_paths import names_a_class
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.cli.search_options import add_hpo_and, check_one_device, own_options, write_output
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.preflight import preflight, preflight_module
from lightning_bge.runtime.run_folder import create_run_dir, write_json

DESCRIPTION = """Train a few real steps, and report for each optimization what was requested, what is in effect, what it
brings, and what to do next."""


def run(args: list[str]) -> None:
    """Print the audit, and write `audit.json` and `audit.html` into the run folder."""
    quiet_optuna()
    kind = ModuleCLI if names_a_class(args) else BGECLI
    cli = kind("audit", args, description=DESCRIPTION, add_arguments=add_hpo_and(AuditConfig))
    options = own_options(cli, AuditConfig)
    check_one_device(cli, "An audit observes one device")
    with running(cli.trainer, keeps=False):
        found, name = _of_texts(cli, options) if isinstance(cli, BGECLI) else _of_module(cli, options)
    run_dir = create_run_dir(cli.run_dir)
    write_json(run_dir / "audit.json", found.as_dict())
    write_output(options.json, found.as_dict())
    page = write_audit_page(run_dir / "audit.html", name, found.as_dict())
    print(describe_audit(found, color=sys.stdout.isatty()))
    print(page)


def _of_texts(cli: BGECLI, options: AuditConfig) -> tuple[Audit, str]:
    """The audit of our own classes, and the model's name."""
    hpo, experiment = cli.config_init.hpo, cli.experiment
    preflight("audit", experiment, hpo, {"json": options.json})
    space = parse_space(hpo.space) if hpo.space else Space({}, {})  # a configuration for `fit` has none
    steps = Steps(cli.datamodule.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
    found = audit_bge_run(BGERun(experiment.build, hpo, steps, cli.config_init.compile), options)
    return found, cli.config.model.name_or_path


def _of_module(cli: ModuleCLI, options: AuditConfig) -> tuple[Audit, str]:
    """The audit of other classes, and the module's class path."""
    preflight_module("audit", cli.run_dir, cli.trainer_arguments, outputs={"json": options.json})
    setup = cli.experiment.build({})
    return audit(setup.model, setup.datamodule, cli.trainer_arguments, config=options), cli.config.model.class_path
