"""The options of every command that trains or evaluates, read by LightningCLI, and the objects built from them."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.cli.class_paths import names_a_class
from lightning_bge.cli.explain import describe_trainer_error, explain
from lightning_bge.cli.option_parser import A_SEED, OptionParser
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.sources import has_groups
from lightning_bge.errors import INTERRUPTED, ConfigError
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.prediction.progress import RowProgressBar
from lightning_bge.runtime.callback_kinds import NEEDS_TRAINING, NOT_IN_TRIALS, without_kinds
from lightning_bge.runtime.compat.lightning import LOGGERS
from lightning_bge.runtime.distributed import AnotherRankFailed, end_ranks
from lightning_bge.runtime.dotted_config import LINKS, OF_STUDIES, plain_config
from lightning_bge.runtime.memory import limit_malloc
from lightning_bge.runtime.option_errors import describe_option_error
from lightning_bge.runtime.paths import check_path
from lightning_bge.trainer import HARMLESS_WARNINGS, BGETrainer, quiet_trainer, take_options, warn_of_unused_callbacks
from lightning_bge.types import Schema

EVALUATES = ("validate", "test", "predict")  # commands that train nothing
AddArguments = Callable[[LightningArgumentParser], Any]


class BGECLI(LightningCLI):
    """Reads the options of one command, and builds its model, data module and trainer.

    Args:
        command: its name, for `--help`.
        args: its arguments.
        description: what it does, for `--help`.
        add_arguments: adds the command's own options to the parser.
    """

    def __init__(
        self, command: str, args: list[str], *, description: str, add_arguments: AddArguments | None = None
    ) -> None:
        quiet_libraries()
        limit_malloc()
        if names_a_class(args):
            raise ConfigError(
                f"model.class_path, data.class_path: expected none for lightning-bge {command}, which needs "
                "BGEClassifier and TextDataModule. hpo, fit, plan and audit take other classes"
            )
        self.command = command
        self.add_arguments = add_arguments
        super().__init__(
            BGEClassifier,
            TextDataModule,
            trainer_class=BGETrainer,
            parser_class=OptionParser,
            trainer_defaults={"max_epochs": 3},  # Lightning's own is 1000
            seed_everything_default=42,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
            args=args,
            run=False,  # a module of this package runs the command
            parser_kwargs={"prog": f"lightning-bge {command}", "description": description},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning that `sys.argv` holds arguments as well: they are the same."""
        self.config = parser.parse_args(args)
        if not str(self.config.run_dir).strip():
            raise ConfigError("run_dir: expected a folder, got nothing. Name one, such as runs/my-run")
        for name in ("run_dir", "data.cache_dir", "model.name_or_path", "output", "json"):
            if self.config.get(name) is not None:
                check_path(name, self.config[name])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, the monitored metric, compilation, memory, and the links between model and data."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder of all that a run writes.")
        parser.add_argument("--monitor", type=MonitorConfig, default=MonitorConfig(), help="The metric of a run.")
        text = "When the encoder's layers are compiled."
        parser.add_argument("--compile", type=CompileConfig, default=CompileConfig(), help=text)
        text = "How the size of a micro-batch is found, where data.batching.max_tokens is auto."
        parser.add_argument("--memory", type=MemoryConfig, default=MemoryConfig(), help=text)
        if self.add_arguments is not None:
            self.add_arguments(parser)
        for source, target in LINKS:
            parser.link_arguments(source, target, _seed if source == "seed_everything" else None)

    def before_instantiate_classes(self) -> None:
        """Take the task from an exported model's schema, and refuse a metric that the task lacks."""
        config = self.config
        if self.command in EVALUATES:
            schema = Schema.load(Path(config.model.name_or_path).expanduser())
            if schema is not None:
                config.model.task = config.data.task = schema.task
        groups = has_groups(config.data.as_dict())
        monitor = check_monitor(MonitorConfig(**config.monitor.as_dict()), config.model.task, groups)
        config.monitor.update(Namespace(**vars(monitor)))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes neither logs nor checkpoints; `fit` has its own."""
        config, evaluates = {**self.config_init.trainer, **kwargs}, self.command in EVALUATES
        warn_of_unused_callbacks(config["callbacks"], self.command, evaluates=evaluates)
        callbacks = without_kinds(config["callbacks"], NEEDS_TRAINING if evaluates else NOT_IN_TRIALS)
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if self.command == "predict" and config["enable_progress_bar"] is not False and not own_bar:
            callbacks.append(RowProgressBar())
        return self.make_trainer({**config, "callbacks": callbacks, "logger": False, "enable_checkpointing": False})

    def make_trainer(self, arguments: dict[str, Any]) -> Trainer:
        """A trainer, or a `ConfigError` in one line that says which of its arguments is wrong."""
        try:
            return self.trainer_class(**arguments)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(describe_trainer_error(error)) from error

    def instantiate_classes(self) -> None:
        """As Lightning's, with the monitored metric, and one line on a class whose package is missing."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Problem with given class_path" not in str(error):
                raise
            raise ConfigError(describe_option_error(str(error))) from error
        self.model.monitored = self.config_init.monitor.metric
        take_options(self.config_init.trainer, self.model, self.datamodule)

    @property
    def run_dir(self) -> Path:
        """The run's folder, which may not exist yet."""
        return Path(self.config_init.run_dir).expanduser()

    def plain_config(self) -> dict[str, Any]:
        """All options as plain data that the same command reads again."""
        return plain_config(self.parser, self.config)

    @property
    def experiment(self) -> TextExperiment:
        """The options of a study's trials, and how objects are made of them."""
        return TextExperiment(
            config=self.config,
            create=self._create,
            validate=self.parser.validate,
            plain=partial(plain_config, self.parser),
            datamodule=self.datamodule,
            monitor=self.config_init.monitor,
            compile=self.config_init.compile,
            memory=self.config_init.memory,
            run_dir=self.run_dir,
        )

    def _create(self, config: Namespace) -> TextTrialSetup:
        """Fresh objects of these options; the data are set up."""
        init = self.parser.instantiate_classes(config)
        init.model.monitored = init.monitor.metric
        take_options(init.trainer, init.model, init.data)
        init.data.setup("fit")
        memory = MicroBatchFinder(init.memory, config.data.cache_dir)
        trainer = partial(quiet_trainer, dict(init.trainer), memory)
        return TextTrialSetup(init.model, init.data, trainer, partial(fit_options, self.parser, config))


def _seed(value: bool | int) -> int:
    """The seed; Lightning's true and false, which let it draw one or set none, leave a run that can't be repeated."""
    if isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"seed_everything: {A_SEED}, got {str(value).lower()}")
    return value


def fit_options(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The options that `fit` reads, as plain data."""
    plain = plain_config(parser, config)
    for name in OF_STUDIES:
        plain.pop(name, None)
    return plain


@contextmanager
def running(trainer: Trainer, keeps: bool = True) -> Iterator[None]:
    """What every training command does when it fails: end all ranks, one message from one of them, the exit status.

    Args:
        trainer: of the command.
        keeps: whether a later call goes on with what was done.
    """
    try:
        try:
            yield
        except Exception as error:
            end_ranks(trainer, 1 if explain(error) is None else 2)
            raise
    except AnotherRankFailed as other:
        raise SystemExit(other.status) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # 1 is what Lightning's `fit` makes of Ctrl-C
        if isinstance(stop, SystemExit) and stop.code not in (1, INTERRUPTED):
            raise
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            kept = ". Finished work is kept: the same command continues" * keeps
            print(f"lightning-bge: interrupted{kept}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def quiet_libraries() -> None:
    """Show our own messages, and of the libraries' only those that a user of this program can act on."""
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: " * (rank > 0) + "%(message)s", force=True)
    logging.getLogger("lightning_bge").setLevel(logging.WARNING if rank else logging.INFO)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
