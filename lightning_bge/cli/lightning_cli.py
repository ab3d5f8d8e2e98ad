"""The commands that build model, data and trainer from one YAML family: fit, validate, test, predict, hpo."""

from __future__ import annotations

import errno
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_bge.advisor.audit.audit import AuditConfig
from lightning_bge.advisor.audit.bge_run import OwnRun, audit_own
from lightning_bge.advisor.audit.console import describe_audit
from lightning_bge.advisor.audit.page import write_audit_page
from lightning_bge.advisor.plan.console import describe_plan
from lightning_bge.advisor.plan.plan import Known, PlanConfig, Search, make_plan
from lightning_bge.advisor.report.report import write_report
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.finder import MemoryConfig, MicroBatchFinder
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError, StudyError, UserError
from lightning_bge.hpo.config import BEST, StudyConfig
from lightning_bge.hpo.forecast.preview import describe_pruner
from lightning_bge.hpo.objective import Objective, Setup
from lightning_bge.hpo.results import describe_study, finish_study
from lightning_bge.hpo.seed_replicates import run_repeats
from lightning_bge.hpo.space.parameter_sets import complete_point, ends, parse_points, points_to_check
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import differences, open_study, others_go_on, run_study
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics import MonitorConfig, best_threshold, check_metric, metric_direction, scores
from lightning_bge.models.oom_retry import REMEDIES
from lightning_bge.models.prediction_file import write_predictions
from lightning_bge.runtime.distributed import end_ranks
from lightning_bge.runtime.dotted_config import LINKS, check_setting, comparable, plain_config, with_overrides
from lightning_bge.runtime.memory import find_oom
from lightning_bge.runtime.run_folder import create_run_dir, describe_run, read_json, write_json, write_text
from lightning_bge.trainer import BGETrainer, fit_callbacks, newest_checkpoint, quiet_trainer
from lightning_bge.types import Schema

Options = TypeVar("Options", bound=Any)

# Commands that read what `hpo` reads, and their own options, without a prefix.
OWN: dict[str, type | None] = {"hpo": None, "plan": PlanConfig, "audit": AuditConfig}


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
            **dict.fromkeys(OWN, skip),
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, what a run is judged by, and the links between model and data."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Where everything of this run goes.")
        parser.add_argument("--monitor", type=MonitorConfig, default=MonitorConfig(), help="What a run is judged by.")
        text = "When the encoder's layers are compiled."
        parser.add_argument("--compile", type=CompileConfig, default=CompileConfig(), help=text)
        text = "How the size of a micro-batch is found, where data.batching.tokens is auto."
        parser.add_argument("--memory", type=MemoryConfig, default=MemoryConfig(), help=text)
        for source, target in LINKS:
            parser.link_arguments(source, target)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in OWN:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # jsonargparse makes a group named after the method, which a method's argument `hpo` can't share
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        parser.add_argument("--hpo", type=StudyConfig, default=StudyConfig(), help="The search.")
        options = OWN[subcommand]
        if options is not None:
            parser.add_class_arguments(options, sub_configs=True)
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
        memory = MicroBatchFinder(self._get(self.config_init, "memory"), self._get(self.config_init, "data").cache_dir)
        config["default_root_dir"] = str(run_dir)
        if config["enable_model_summary"] is None:  # it counts no packed FLOPs, and no bf16
            config["enable_model_summary"] = False
        if config["logger"] is None:
            # a version for each time that it is started: it would delete what the one before has logged
            config["logger"] = CSVLogger(run_dir, name="logs")
        config["callbacks"] = [*(config["callbacks"] or []), *fit_callbacks(run_dir, monitor, compiling, memory)]
        return self.trainer_class(**config)

    def build(self, overrides: dict[str, Any]) -> Setup:
        """Fresh objects for the settings with some replaced by values that passed `check`; data set up."""
        parser = self._parser(self.subcommand)
        config = with_overrides(self.config[self.subcommand], overrides)
        init = parser.instantiate(config)
        init.data.setup("fit")
        memory = MicroBatchFinder(init.memory, config.data.cache_dir)
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
            end_ranks(self.trainer, 1 if explain(error) is None else 2)
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
        encoder = self._warm_encoder(hpo)
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
        print(f"  {write_report(run_dir).name:<14}all of it to look at, in a browser; needs no network")

    def plan(self, model: BGEClassifier, datamodule: TextDataModule, hpo: StudyConfig) -> None:
        """Say what the study would take, before it is started."""
        process_s, options = time.process_time(), self._options(PlanConfig)
        json = _writable(options.json)
        if self.trainer.world_size > 1:
            raise ConfigError("trainer.devices: a search trains on one device: set it to 1, and plan for --workers")
        if options.trials is not None:
            hpo = replace(hpo, trials=options.trials)
        config, space = self.config[self.subcommand], parse_space(hpo.space)
        self._check_search(hpo, space)
        datamodule.setup("fit")
        monitor, compiling = (self._get(self.config_init, name) for name in ("monitor", "compile"))
        checks = sum(1 for _ in points_to_check(space, config.get)) + len(hpo.enqueue)
        times = Known(_most_epochs(config, space), config.trainer.max_epochs, process_s, checks)
        run_dir = Path(self._get(self.config_init, "run_dir"))
        encoder = self._warm_encoder(hpo)
        found = make_plan(Search(self.build, hpo, monitor, compiling, datamodule, run_dir, encoder, times), options)
        print(describe_plan(found))
        if json is not None:
            write_json(json, found.as_dict())

    def audit(self, model: BGEClassifier, datamodule: TextDataModule, hpo: StudyConfig) -> None:
        """Find out what is really in effect, and what is still to be gained; write it into the run folder."""
        options = self._options(AuditConfig)
        json = _writable(options.json)
        if self.trainer.world_size > 1:
            raise ConfigError("trainer.devices: an audit watches one device: set it to 1")
        datamodule.setup("fit")
        config = self.config[self.subcommand]
        space = parse_space(hpo.space) if hpo.space else Space({}, {})  # `fit` has none
        epochs = _most_epochs(config, space)
        steps = Steps(datamodule.num_folds, epochs, hpo.reports_per_epoch)
        run_dir = create_run_dir(self._get(self.config_init, "run_dir"))
        found = audit_own(OwnRun(self.build, hpo, steps, self._get(self.config_init, "compile")), options)
        for path in filter(None, (run_dir / "audit.json", json)):
            write_json(path, found.as_dict())
        page = write_audit_page(run_dir / "audit.html", config.model.name_or_path, found)
        print(describe_audit(found, color=sys.stdout.isatty()))
        print(f"{page}")

    def _warm_encoder(self, hpo: StudyConfig) -> EncoderCache:
        """What a search loads its models by."""
        granted = self._get(self.config_init, "memory").limit_gb
        return EncoderCache(hpo.warm_bytes, None if granted is None else round(granted * 2**30))

    def _options(self, kind: type[Options]) -> Options:
        """The command's own options."""
        return kind(**{field.name: self._get(self.config_init, field.name) for field in fields(kind)})

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
            print(f"{write_report(run_dir)}: all of it to look at, in a browser; needs no network")

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


def _writable(path: str | None) -> Path | None:
    """A file to be written later, in a folder that is made now, before something is measured for minutes."""
    if path is None:
        return None
    found = Path(path).expanduser()
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


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


def explain(error: Exception) -> str | None:
    """What a user can do about an error; None where it is a defect, whose traceback matters."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room on the disk ({error}). What is finished is kept: free some room and run this again"
    failed = find_oom(error)
    return None if failed is None else f"{failed}. What is finished is kept. To mend it, {REMEDIES}"
