"""`lightning-bge fit` of a module that is not ours: checkpoints, resuming and a report, and nothing else of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from lightning_bge.advisor.report.report import write_report
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.cli.lightning_cli import running
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.cli.run_record import has_begun, more_epochs
from lightning_bge.hpo.trial.fold_callbacks import early_stopping
from lightning_bge.hpo.trial.module_setup import SavedRandomState
from lightning_bge.preflight import dry_run_options, preflight_module
from lightning_bge.runtime.callback_kinds import callback_list
from lightning_bge.runtime.compat.lightning import trainer_class
from lightning_bge.runtime.dotted_config import comparable
from lightning_bge.runtime.run_folder import create_run_dir, read_config, read_json, record_run, write_json
from lightning_bge.trainer import BestCheckpoint, check_checkpoints, newest_checkpoint, run_checkpoints


def fit_module(args: list[str], description: str) -> None:
    """Train, or continue a run that was interrupted; a finished one is only reported.

    Args:
        args: of the command.
        description: of the command.
    """
    cli = ModuleCLI("fit", args, description=description, add_arguments=_add_weights_only)
    with running(cli.trainer):
        _fit(cli)


def _add_weights_only(parser: LightningArgumentParser) -> None:
    text = "Go on from checkpoints of tensors and plain data alone; false: the module adds other objects to them."
    parser.add_argument("--weights_only", type=bool, default=True, help=text)


def _fit(cli: ModuleCLI) -> None:
    first = cli.trainer.is_global_zero  # only this rank reads the configuration, writes and prints
    if first:
        preflight_module("fit", cli.run_dir, cli.trainer_arguments)
    setup = cli.experiment.build({})
    kind = trainer_class(setup.model)
    if limits := dry_run_options(cli.trainer_arguments):
        off = {"logger": False, "enable_checkpointing": False}
        kind(**{**cli.trainer_arguments, **off}).fit(setup.model, datamodule=setup.datamodule)
        if first:
            print(f"dry run ({limits}): no checkpoint or summary is written, and {cli.run_dir} is left as it was")
        return
    check_checkpoints(cli.trainer_arguments, cli.run_dir)
    if first:
        _check_same_run(cli)
    run_dir = create_run_dir(cli.run_dir)
    summary = read_json(run_dir / "summary.json")
    if summary is None:
        checkpoint = newest_checkpoint(run_dir)
        if first:
            if checkpoint is not None:
                print(f"resuming from {checkpoint}", flush=True)
            record_run(run_dir, cli.experiment.plain(cli.config), None)
        trainer = _trainer(kind, cli, run_dir)
        trainer.fit(
            setup.model, datamodule=setup.datamodule, ckpt_path=checkpoint, weights_only=cli.config.weights_only
        )
        summary = _summary(cli, trainer)
        if first:
            write_json(run_dir / "summary.json", summary)
    elif first:
        print(f"{run_dir} is finished; a higher trainer.max_epochs goes on with it, another --run_dir begins anew")
    if first:
        print(yaml.safe_dump(summary, sort_keys=False).rstrip())
        print(f"{write_report(run_dir)}: the report, for a browser; it needs no network")


def _trainer(kind: Any, cli: ModuleCLI, run_dir: Path) -> Trainer:
    """The user's trainer, with the checkpoints of the run, a CSV logger where there is none, and early stopping."""
    config = {**cli.trainer_arguments, "default_root_dir": str(run_dir)}
    if config["logger"] is None:  # a new version for each start: a CSVLogger deletes what is in its folder
        config["logger"] = CSVLogger(run_dir, name="logs")
    monitor = cli.config_init.monitor
    ours = [OOMHandler(), SavedRandomState(), *early_stopping(monitor), *run_checkpoints(run_dir, monitor)]
    trainer: Trainer = kind(**{**config, "callbacks": [*callback_list(config["callbacks"]), *ours]})
    return trainer


def _summary(cli: ModuleCLI, trainer: Trainer) -> dict[str, Any]:
    """The best epoch, its value and its checkpoint, and what was logged last."""
    [best] = [one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)]
    return {
        "metric": cli.config_init.monitor.name,
        "value": None if best.best_model_score is None else float(best.best_model_score),
        "checkpoint": best.best_model_path,
        "epochs": trainer.current_epoch,
        "last": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
    }


def _check_same_run(cli: ModuleCLI) -> None:
    """Refuse to continue a run of other options; more epochs make a finished run one to be continued.

    Raises:
        StudyError: the folder holds another run; the message lists the differences.
    """
    run_dir = cli.run_dir
    if not has_begun(run_dir):
        return
    epochs = more_epochs(comparable(read_config(run_dir)), comparable(cli.experiment.plain(cli.config)), run_dir)
    if epochs is not None:
        print(f"going on from {epochs[0]} to {epochs[1]} epochs", flush=True)
        (run_dir / "summary.json").unlink(missing_ok=True)
