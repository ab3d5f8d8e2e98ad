"""`lightning-bge audit`: which optimizations are in effect, and what could still be gained."""

import sys

from lightning_bge.advisor.audit.bge_run import BGERun, audit_bge_run
from lightning_bge.advisor.audit.output import describe_audit, write_audit_page
from lightning_bge.advisor.audit.result import AuditConfig
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.search_options import add_hpo_and, check_one_device, own_options, write_output
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.preflight import preflight
from lightning_bge.runtime.run_folder import create_run_dir, write_json

DESCRIPTION = """Train a few real steps, and report for each optimization what was requested, what is in effect, what it
brings, and what to do next."""


def run(args: list[str]) -> None:
    """Print the audit, and write `audit.json` and `audit.html` into the run folder."""
    quiet_optuna()
    cli = BGECLI("audit", args, description=DESCRIPTION, add_arguments=add_hpo_and(AuditConfig))
    options, hpo = own_options(cli, AuditConfig), cli.config_init.hpo
    check_one_device(cli, "An audit observes one device")
    with running(cli.trainer, keeps=False):
        preflight("audit", cli.experiment, hpo, {"json": options.json})
        experiment = cli.experiment
        space = parse_space(hpo.space) if hpo.space else Space({}, {})  # a configuration for `fit` has none
        steps = Steps(cli.datamodule.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
        run_dir = create_run_dir(cli.run_dir)
        found = audit_bge_run(BGERun(experiment.build, hpo, steps, cli.config_init.compile), options)
    write_json(run_dir / "audit.json", found.as_dict())
    write_output(options.json, found.as_dict())
    page = write_audit_page(run_dir / "audit.html", cli.config.model.name_or_path, found.as_dict())
    print(describe_audit(found, color=sys.stdout.isatty()))
    print(page)
