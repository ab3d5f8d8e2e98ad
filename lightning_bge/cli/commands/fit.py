"""`lightning-bge fit`: train one model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger

from lightning_bge.advisor.report.report import write_report
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.cli.class_paths import names_a_class
from lightning_bge.cli.evaluate import without_prefix
from lightning_bge.cli.lightning_cli import BGECLI, running
from lightning_bge.cli.module_fit import fit_module
from lightning_bge.cli.run_record import check_same_run, contents, start_more_epochs
from lightning_bge.cli.user_callbacks import check_callbacks
from lightning_bge.data.sources import has_groups
from lightning_bge.errors import StudyError
from lightning_bge.models.metrics.constants import majority_baseline, warn_of_constants
from lightning_bge.models.metrics.logged import logged_names
from lightning_bge.models.metrics.predictions import scores
from lightning_bge.models.metrics.threshold import best_threshold
from lightning_bge.models.output.prediction_file import write_predictions
from lightning_bge.preflight import dry_run_options, preflight
from lightning_bge.runtime.callback_kinds import NEEDS_FIT, callback_list, without_kinds
from lightning_bge.runtime.run_folder import create_run_dir, read_json, record_run, write_json
from lightning_bge.trainer import BestCheckpoint, check_checkpoints, fit_callbacks, newest_checkpoint

DESCRIPTION = """Train one model, choose its decision threshold, export it, and score the test file once.
An interrupted run continues from its last checkpoint when the same command is run again, and a finished one with a
higher trainer.max_epochs. With trainer.fast_dev_run or a limit on batches nothing is written."""

MODULE_DESCRIPTION = """Train a module of another project, as LightningCLI reads it. An interrupted run continues from
its last checkpoint when the same command is run again, and a finished one with a higher trainer.max_epochs."""


class FitCLI(BGECLI):
    """`fit` alone writes logs and checkpoints."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with a CSV logger, checkpoints, early stopping and the callbacks that make training fast."""
        init = self.config_init
        config = {**init.trainer, **kwargs, "default_root_dir": str(self.run_dir)}
        if config["enable_model_summary"] is None:  # it knows neither packed FLOPs nor bf16
            config["enable_model_summary"] = False
        if config["logger"] is None:
            # a new version for each start: a CSVLogger deletes what is in its folder
            config["logger"] = CSVLogger(self.run_dir, name="logs")
        groups = has_groups(self.config.data.as_dict())
        check_callbacks(config["callbacks"], logged_names(init.model.task, init.monitor, groups))
        finder = MicroBatchFinder(init.memory, init.data.cache_dir)
        callbacks = [
            *callback_list(config["callbacks"]),
            *fit_callbacks(self.run_dir, init.monitor, init.compile, finder),
        ]
        if dry_run_options(config):
            callbacks = without_kinds(callbacks, NEEDS_FIT)
            config |= {"logger": False, "enable_checkpointing": False}
        else:
            check_checkpoints(config, self.run_dir)
        return self.make_trainer({**config, "callbacks": callbacks})


def run(args: list[str]) -> None:
    """Train, or continue a run that was interrupted; a finished one is only reported."""
    if names_a_class(args):
        fit_module(args, MODULE_DESCRIPTION)
        return
    cli = FitCLI("fit", args, description=DESCRIPTION)
    with running(cli.trainer):
        _fit(cli)


def _fit(cli: FitCLI) -> None:
    trainer, model, datamodule = cli.trainer, cli.model, cli.datamodule
    first = trainer.is_global_zero  # only this rank reads the configuration, writes and prints
    if first:
        preflight("fit", cli.experiment)
    if limits := dry_run_options(cli.config_init.trainer):
        _dry_run(cli, limits)
        return
    if first and (epochs := check_same_run(cli, cli.run_dir, datamodule)) is not None:
        start_more_epochs(cli, cli.run_dir, epochs)
    run_dir = create_run_dir(cli.run_dir)
    summary = read_json(run_dir / "summary.json")
    if summary is None:
        checkpoint = newest_checkpoint(run_dir)
        if first:
            if checkpoint is not None:
                print(f"resuming from {checkpoint}", flush=True)
            record_run(run_dir, cli.plain_config(), datamodule.data_hash, contents(datamodule))
        trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        # it would validate with the last average in place of the weights that are loaded next
        trainer.callbacks = without_kinds(trainer.callbacks, (WeightAveraging,))  # type: ignore[attr-defined]
        summary = _finish(cli, run_dir)
    elif first:
        print(f"{run_dir} is finished; a higher trainer.max_epochs goes on with it, another --run_dir begins anew")
    if first:
        shown = {name: value for name, value in summary.items() if name != "warnings"}
        print(yaml.safe_dump(shown, sort_keys=False).rstrip())
        for warning in summary["warnings"]:
            print(f"WARNING: {warning}")
        print(f"{write_report(run_dir)}: the report, for a browser; it needs no network")


def _dry_run(cli: FitCLI, limits: str) -> None:
    """Train and validate on parts of the data; the test file is not scored, as that is done once."""
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule)
    if cli.trainer.is_global_zero:
        print(f"dry run ({limits}): no model, checkpoint or summary is written, and {cli.run_dir} is left as it was")


def _finish(cli: FitCLI, run_dir: Path) -> dict[str, Any]:
    """Load the best epoch, choose the threshold, export, score the test file once; rank 0 alone writes."""
    trainer, model, datamodule = cli.trainer, cli.model, cli.datamodule
    monitor = cli.config_init.monitor
    epoch = _load_best(cli)
    [found] = trainer.validate(model, datamodule=datamodule, verbose=False)
    schema, predictions = model.schema, model.predictions
    baseline = majority_baseline(schema, predictions, monitor)
    summary: dict[str, Any] = {
        "metric": monitor.name,
        "epoch": epoch,
        "positive_label": schema.positive_label,
        "validation": without_prefix(found),
        "majority_baseline": baseline if math.isfinite(baseline) else None,
        "warnings": warn_of_constants(schema, predictions, monitor, found.get(monitor.logged, math.nan), baseline),
    }
    if schema.task in ("binary", "multilabel"):
        score = scores(schema.task, predictions.logits).numpy()
        threshold = best_threshold(score, predictions.labels.numpy(), monitor.name)
        model.set_schema(replace(schema, threshold=threshold))
        summary["threshold"] = threshold
        summary["threshold_note"] = "chosen on the validation rows; the figures without tuned_ are at 0.5"
    if trainer.is_global_zero:
        write_predictions(run_dir / "validation.csv", model.schema, predictions)
        summary["model_dir"] = str(model.export(run_dir / "model", datamodule.new_tokenizer()))
    if datamodule.has_test_rows:
        [found] = trainer.test(model, datamodule=datamodule, verbose=False)
        summary["test"] = without_prefix(found)
    if trainer.is_global_zero:
        if datamodule.has_test_rows:
            write_predictions(run_dir / "test.csv", model.schema, model.predictions)
        write_json(run_dir / "summary.json", summary)
    return summary


def _load_best(cli: FitCLI) -> int:
    """Put the weights of the epoch that counts into the model; returns its number, counted from 1."""
    [ours] = [one for one in cli.trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)]
    best = ours.best_model_path
    if cli.config_init.monitor.objective != "best" or not best:
        return cli.trainer.current_epoch
    if not Path(best).is_file():
        raise StudyError(
            f"{best} is missing: the checkpoint of the best epoch. Restore it, or delete the checkpoints beside it "
            "and begin anew"
        )
    content = torch.load(best, weights_only=True, map_location="cpu")
    cli.model.load_state_dict(content["state_dict"])
    return content["epoch"] + 1
