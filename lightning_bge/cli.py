"""`lightning-bge`: turns YAML and flags into objects and calls the rooms."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from argparse import ArgumentParser
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_bge.callbacks import BudgetFinder, CompileConfig, MemoryConfig
from lightning_bge.data import TableConfig, TextDataModule, read_table, write_sample
from lightning_bge.ddp import AnotherRankFailed, end_ranks
from lightning_bge.errors import ConfigError, StudyError, UserError
from lightning_bge.hpo import (
    BEST,
    INTERRUPTED,
    MemoryKeptError,
    Objective,
    Setup,
    Space,
    Steps,
    StudyConfig,
    complete_point,
    describe_pruner,
    describe_study,
    differences,
    ends,
    finish_study,
    open_study,
    others_go_on,
    parse_points,
    parse_space,
    points_to_check,
    quiet_optuna,
    run_repeats,
    run_study,
)
from lightning_bge.memory import find_oom, spare_address_space
from lightning_bge.models import BGEClassifier, WarmEncoder, best_threshold
from lightning_bge.models.ladder import REMEDIES
from lightning_bge.models.metrics import MonitorConfig, check_metric, metric_direction, scores
from lightning_bge.models.output import write_predictions
from lightning_bge.models.tiny import build_tiny_bert
from lightning_bge.runs import create_run_dir, describe_run, read_json, write_json, write_text
from lightning_bge.settings import LINKS, check_setting, comparable, plain_config, with_overrides
from lightning_bge.trainer import BGETrainer, fit_callbacks, newest_checkpoint, quiet_trainer
from lightning_bge.types import Schema

log = logging.getLogger("lightning_bge")


class BGECLI(LightningCLI):
    """The sub-commands that train: each builds model, data and trainer from one YAML family."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            BGEClassifier,
            TextDataModule,
            trainer_class=BGETrainer,
            trainer_defaults={"max_epochs": 3},  # Lightning's own is 1000
            seed_everything_default=42,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Sub-commands, and which of the methods' arguments are no options."""
        skip = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {
            "fit": skip | {"ckpt_path"},
            "validate": {*skip, "verbose", "ckpt_path"},
            "test": {*skip, "verbose", "ckpt_path"},
            "predict": skip,
            "hpo": skip,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, what a run is judged by, and the links between model and data."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Where everything of this run goes.")
        parser.add_argument("--monitor", type=MonitorConfig, default=MonitorConfig(), help="What a run is judged by.")
        text = "When the encoder's layers are compiled."
        parser.add_argument("--compile", type=CompileConfig, default=CompileConfig(), help=text)
        text = "How the token budget of a micro-batch is found, where data.batching.tokens is auto."
        parser.add_argument("--memory", type=MemoryConfig, default=MemoryConfig(), help=text)
        for source, target in LINKS:
            parser.link_arguments(source, target)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "hpo":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # jsonargparse makes a group named after the method, which a method's argument `hpo` can't share
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        parser.add_argument("--hpo", type=StudyConfig, default=StudyConfig(), help="The search.")
        self._subcommand_method_arguments[subcommand] = ["hpo"]
        return parser

    # ------------------------------------------------------------------ building

    def before_instantiate_classes(self) -> None:
        """An exported model's own schema says its task; a metric that the task lacks is refused early."""
        config = self.config[self.subcommand]
        if self.subcommand in ("validate", "test", "predict"):
            schema = Schema.load(Path(config.model.name_or_path).expanduser())
            if schema is not None:
                config.model.task = config.data.task = schema.task
        grouped = config.data.group_column is not None
        config.monitor.metric = check_metric(config.model.task, config.monitor.metric, grouped)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of this sub-command; `fit` alone writes logs and checkpoints."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if self.subcommand != "fit":
            return self.trainer_class(**{**config, "logger": False, "enable_checkpointing": False})
        run_dir, monitor = Path(self._get(self.config_init, "run_dir")), self._get(self.config_init, "monitor")
        compiling = self._get(self.config_init, "compile")
        memory = BudgetFinder(self._get(self.config_init, "memory"), self._get(self.config_init, "data").cache_dir)
        config["default_root_dir"] = str(run_dir)
        if config["enable_model_summary"] is None:  # it counts no packed FLOPs, and no bf16
            config["enable_model_summary"] = False
        if config["logger"] is None:
            config["logger"] = CSVLogger(run_dir, name="", version="logs")
        config["callbacks"] = [*(config["callbacks"] or []), *fit_callbacks(run_dir, monitor, compiling, memory)]
        return self.trainer_class(**config)

    def build(self, overrides: dict[str, Any]) -> Setup:
        """Fresh objects for the settings with some replaced by values that passed `check`; data set up."""
        parser = self._parser(self.subcommand)
        config = with_overrides(self.config[self.subcommand], overrides)
        init = parser.instantiate(config)
        init.data.setup("fit")
        memory = BudgetFinder(init.memory, config.data.cache_dir)
        trainer = partial(quiet_trainer, dict(init.trainer), memory)
        return Setup(init.model, init.data, trainer, partial(_plain_settings, parser, config))

    def _check_search(self, hpo: StudyConfig, space: Space) -> None:
        """Try the ends of the search space and the points that come first, before a study is there."""
        points, config = parse_points(hpo.enqueue, space), self.config[self.subcommand]
        for name in space:
            check_setting(config, name)
        for settings in points_to_check(space, config.get):
            self.check(settings)
        for point in points:
            self.check(complete_point(space, point, config.get), "hpo.enqueue")

    def check(self, overrides: dict[str, Any], where: str = "hpo.space") -> None:
        """Raise `ConfigError` where settings do not take such values."""
        config = with_overrides(self.config[self.subcommand], overrides)
        try:
            self._parser(self.subcommand).validate(config)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{where}: {overrides} are not values that these settings take: {error}") from error
        self.build(overrides)

    # ------------------------------------------------------------------ sub-commands

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; where it fails on several ranks, one of them says why."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            end_ranks(self.trainer, 1 if _explain(error) is None else 2)
            raise

    def hpo(self, model: BGEClassifier, datamodule: TextDataModule, hpo: StudyConfig) -> None:
        """Run the study of the run folder, or what is missing of it."""
        if self.trainer.world_size > 1:
            raise ConfigError(
                "trainer.devices: a search trains on one device: set it to 1. To use more, start this command once for "
                "each, with one CUDA_VISIBLE_DEVICES each and the same --run_dir: they share the study"
            )
        config = self.config[self.subcommand]
        space = parse_space(hpo.space)
        monitor: MonitorConfig = self._get(self.config_init, "monitor")
        self._check_search(hpo, space)
        epochs = _most_epochs(config, space)
        datamodule.setup("fit")
        folds = datamodule.num_folds
        run_dir = create_run_dir(self._get(self.config_init, "run_dir"))
        split = "a single split" if folds == 1 else f"{folds} folds"
        print(f"study {run_dir.name}: {hpo.trials} trials, {split}, at most {epochs} epochs each; ", end="")
        print(f"judged by {monitor.metric} of the {monitor.objective} epoch, mean over the folds")
        steps = Steps(folds, epochs, hpo.reports_per_epoch)
        print(describe_pruner(hpo.pruner, hpo.trials, steps))
        if hpo.further_seeds:
            print(f"at the end the best trials, up to {BEST}, are run again; other seeds for each: {hpo.further_seeds}")
        parser = self._parser(self.subcommand)
        # a setting that is searched under a condition has its configured value in all other trials
        settings = comparable(plain_config(parser, config), tuple(name for name in space if name not in space.when))
        settings |= {"data_hash": datamodule.data_hash, "folds_hash": datamodule.folds_hash}
        if hpo.reports_per_epoch > 1:  # left out, so that studies of before can go on
            settings["hpo.report_every"] = hpo.report_every
        direction = metric_direction(str(monitor.metric))
        study = open_study(run_dir, hpo, direction, steps, settings)
        since = time.monotonic()
        self._record(run_dir, datamodule)
        compiling = self._get(self.config_init, "compile")
        trials, oof_dir, per_epoch = hpo.trials, run_dir / "oof", hpo.reports_per_epoch
        granted = self._get(self.config_init, "memory").limit_gb
        encoder = WarmEncoder(hpo.warm_bytes, None if granted is None else round(granted * 2**30))
        paused_dir = run_dir / "paused"
        objective = Objective(
            self.build,
            space,
            monitor,
            folds,
            epochs,
            oof_dir,
            trials,
            compiling,
            per_epoch,
            encoder,
            hpo.cost,
            paused_dir,
        )
        run_study(study, objective, hpo, str(monitor.metric), steps.total, paused_dir)
        if others_go_on(study):
            print("other processes still run trials of this study: the last of them ends it")
            return
        repeats = run_repeats(study, objective, hpo, str(monitor.metric), steps.total, config.seed_everything, since)
        if repeats is not None and repeats.elsewhere:
            print(f"other processes are running {repeats.elsewhere} of the repeats: the last of them ends the study")
            return
        encoder.let_go()
        # of a trial that has drawn no number of epochs
        usual = config.trainer.max_epochs if "trainer.max_epochs" in space.when else epochs
        summary = finish_study(study, self.build, monitor, run_dir, usual, hpo.refit, repeats)
        print(describe_study(run_dir, summary))

    def fit(self, model: BGEClassifier, datamodule: TextDataModule) -> None:
        """Train once; a run that was cut off goes on from its last checkpoint."""
        run_dir = create_run_dir(self._get(self.config_init, "run_dir"))
        first = self.trainer.is_global_zero  # it alone reads its settings, writes and prints
        if first:
            datamodule.setup("fit")
            self._check_run(run_dir, datamodule)
        summary = read_json(run_dir / "summary.json")
        if summary is None:
            checkpoint = newest_checkpoint(run_dir)
            if first:
                if checkpoint is not None:
                    print(f"going on from {checkpoint}", flush=True)
                self._record(run_dir, datamodule)
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
            summary = self._finish_fit(run_dir, model, datamodule)
        elif first:
            print(f"{run_dir} is finished; name another --run_dir to train again")
        if first:
            print(yaml.safe_dump(summary, sort_keys=False).rstrip())

    def predict(self, model: BGEClassifier, datamodule: TextDataModule, output: str) -> None:
        """Write a score and a label for each row of `data.predict_file`."""
        if datamodule.predict_file is None:
            raise ConfigError("predict needs a file: set data.predict_file")
        self.trainer.predict(model, datamodule=datamodule)
        if not self.trainer.is_global_zero:
            return
        assert model.predictions is not None
        assert model.schema is not None
        write_predictions(Path(output), model.schema, replace(model.predictions, labels=None))
        print(f"{len(model.predictions.rows)} rows: {output}")

    def _finish_fit(self, run_dir: Path, model: BGEClassifier, datamodule: TextDataModule) -> dict[str, Any]:
        """Take the epoch that counts, choose the threshold, export, score the test file once; rank 0 alone writes."""
        first = self.trainer.is_global_zero
        monitor: MonitorConfig = self._get(self.config_init, "monitor")
        best = self.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        epoch = self.trainer.current_epoch
        if monitor.objective == "best" and best:
            content = torch.load(best, weights_only=True, map_location="cpu")
            model.load_state_dict(content["state_dict"])
            epoch = content["epoch"] + 1
        [found] = self.trainer.validate(model, datamodule=datamodule, verbose=False)
        assert model.predictions is not None
        assert model.predictions.labels is not None
        assert model.schema is not None
        summary: dict[str, Any] = {"metric": monitor.metric, "epoch": epoch, "validation": _strip(found)}
        if model.schema.task in ("binary", "multilabel"):
            score, labels = scores(model.schema.task, model.predictions.logits), model.predictions.labels
            threshold = best_threshold(score.numpy(), labels.numpy(), str(monitor.metric))
            model.schema = replace(model.schema, threshold=threshold)
            summary["threshold"] = threshold
            summary["threshold_note"] = "chosen on the validation rows; the validation figures are at 0.5"
        if first:
            write_predictions(run_dir / "validation.csv", model.schema, model.predictions)
            summary["model_dir"] = str(model.export(run_dir / "model", datamodule.new_tokenizer()))
        if datamodule.test_file is not None:
            [found] = self.trainer.test(model, datamodule=datamodule, verbose=False)
            summary["test"] = _strip(found)
        if first:
            if datamodule.test_file is not None:
                write_predictions(run_dir / "test.csv", model.schema, model.predictions)
            write_json(run_dir / "summary.json", summary)
        return summary

    # ------------------------------------------------------------------ run folders

    def _record(self, run_dir: Path, datamodule: TextDataModule) -> None:
        """Write `config.yaml`, and `run.json` with one entry for each call."""
        config = self.config[self.subcommand]
        plain = plain_config(self._parser(self.subcommand), config)
        write_text(run_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
        calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
        seed = config.seed_everything
        calls.append(describe_run(seed, datamodule.data_hash, config.model.name_or_path, config.model.revision))
        write_json(run_dir / "run.json", {"calls": calls})

    def _check_run(self, run_dir: Path, datamodule: TextDataModule) -> None:
        """Refuse to go on with a run of other settings or other data."""
        path = run_dir / "config.yaml"
        if not path.is_file():
            return
        old = comparable(yaml.safe_load(path.read_text(encoding="utf-8")))
        new = comparable(plain_config(self._parser(self.subcommand), self.config[self.subcommand]))
        calls = (read_json(run_dir / "run.json") or {}).get("calls", [])
        if calls:
            old["data"], new["data"] = calls[-1]["data_hash"], datamodule.data_hash
        if different := differences(old, new):
            raise StudyError(
                f"{run_dir} holds another run. What differs:\n  "
                + "\n  ".join(different)
                + "\nName another --run_dir, or delete that folder."
            )


def _plain_settings(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    plain = plain_config(parser, config)
    plain.pop("hpo", None)
    return plain


def _most_epochs(config: Namespace, space: Space) -> int:
    if any(name.startswith("data.split.") for name in space):
        raise ConfigError("hpo.space: data.split can't be searched: trials on different folds are not comparable")
    searched = ends(space["trainer.max_epochs"]) if "trainer.max_epochs" in space else ()
    if searched and "trainer.max_epochs" not in space.when:
        return max(searched)
    if config.trainer.max_epochs is None or config.trainer.max_epochs < 1:
        raise ConfigError(f"trainer.max_epochs: a search needs 1 or more, got {config.trainer.max_epochs}")
    return max([config.trainer.max_epochs, *searched])


def _strip(metrics: dict[str, float] | Any) -> dict[str, float]:
    return {name.split("_", 1)[1]: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------- the program

DESCRIPTION = """Fine-tune and tune BGE text encoders: fast by default.

Another command, with a --help of its own: `lightning-bge sample FOLDER` writes generated text pairs and a small
model to try everything with; it needs no network.
"""


def main(args: list[str] | None = None) -> None:
    """Run the program; a user's mistake ends with one message and status 2, Ctrl-C with 130."""
    given = sys.argv[1:] if args is None else args
    _quieten()
    spare_address_space()
    try:
        if given[:1] == ["sample"]:
            make_sample(given[1:])
        else:
            BGECLI(args=args, parser_kwargs={"prog": "lightning-bge", "description": DESCRIPTION})
    except MemoryKeptError as error:
        if args is not None:
            _leave(str(error), 2)
        print(f"lightning-bge: {error}. Doing so", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except AnotherRankFailed as other:
        raise SystemExit(other.status) from None
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        _leave(explanation, 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # 1 is what Lightning's `fit` makes of Ctrl-C
        if isinstance(stop, SystemExit) and stop.code not in (1, INTERRUPTED):
            raise
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            raise SystemExit(INTERRUPTED) from None
        _leave("interrupted. What is finished is kept: the same command goes on from there", INTERRUPTED)


def _explain(error: Exception) -> str | None:
    """What a user can do about an error; None where it is a defect, whose traceback matters."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room on the disk ({error}). What is finished is kept: free some room and run this again"
    failed = find_oom(error)
    return None if failed is None else f"{failed}. What is finished is kept. To mend it, {REMEDIES}"


def _leave(text: str, status: int) -> None:
    print(f"lightning-bge: {text}", file=sys.stderr)
    raise SystemExit(status)


def _quieten() -> None:
    """Our own messages on stderr, and of the libraries' only those that a user of this program can act on."""
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: " * (rank > 0) + "%(message)s", force=True)
    log.setLevel(logging.WARNING if rank else logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet_optuna()
    for pattern in (
        ".*does not have many workers.*",  # rows are tokenised and in memory: 0 workers are the fastest
        ".*exists and is not empty.*",  # a run folder that is gone on with
        ".*number of training batches.*smaller than the logging interval.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6.6 under torch 2.13
    ):
        warnings.filterwarnings("ignore", pattern)


def make_sample(args: list[str]) -> None:
    """`lightning-bge sample FOLDER`: `train.csv`, `test.csv` and `model/`."""
    parser = ArgumentParser(
        prog="lightning-bge sample", description="Write generated text pairs and a small BERT with its own tokenizer."
    )
    parser.add_argument("folder", help="Where to; train.csv, test.csv and model/ are written there.")
    parser.add_argument("--seed", type=int, default=0, help="Of the texts and the model's weights.")
    chosen = parser.parse_args(args)
    folder = create_run_dir(chosen.folder)
    write_sample(folder, seed=chosen.seed)
    rows = read_table(folder / "train.csv", ("text", "criterion"), None, None, TableConfig())
    build_tiny_bert(folder / "model", [text for row in rows.texts for text in row], seed=chosen.seed)
    print(f"{folder}: train.csv, test.csv, model/")


if __name__ == "__main__":
    main()
