"""The options of a command for a module that is not ours, as LightningCLI reads them, and the objects built of them."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.class_paths import package_of_classes
from lightning_bge.cli.lightning_cli import AddArguments, fit_options, quiet_libraries
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.module_experiment import LoggedMetric, ModuleExperiment
from lightning_bge.hpo.trial.module_setup import ModuleTrialSetup
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.dotted_config import plain_config
from lightning_bge.runtime.option_errors import describe_option_error
from lightning_bge.trainer import MODULE_DEFAULTS, module_trainer, warn_of_unused_callbacks


class ModuleCLI:
    """Reads the options of one command, and builds what they name.

    Args:
        command: its name, for `--help`.
        args: its arguments.
        description: what it does, for `--help`.
        add_arguments: adds the command's own options to the parser.

    Attributes:
        config: the options.
        config_init: the same with objects in the place of their options.
        trainer: of the command.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(self, command: str, args: list[str], *, description: str, add_arguments: AddArguments) -> None:
        quiet_libraries()
        self.command = command
        package = package_of_classes(args)
        kind: Any = importlib.import_module(f"{package}.cli").LightningCLI
        self._trainer_class = importlib.import_module(package).Trainer

        class CLI(kind):
            def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
                self.config = parser.parse_args(args)  # without the warning that `sys.argv` holds arguments as well

            def instantiate_trainer(self, **kwargs: Any) -> Any:
                # once: a copy of this object makes module and data of each trial, which has trainers of its own
                return self.trainer if "trainer" in vars(self) else super().instantiate_trainer(**kwargs)

            def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
                text = "Folder of all that a run writes."
                parser.add_argument("--run_dir", type=str, default="runs/default", help=text)
                parser.add_argument("--monitor", type=LoggedMetric, default=LoggedMetric(), help="The metric of a run.")
                add_arguments(parser)

        try:
            self._cli = CLI(
                trainer_class=self._trainer_class,
                trainer_defaults={"max_epochs": 3, **MODULE_DEFAULTS},  # Lightning's own are 1000
                seed_everything_default=42,
                save_config_callback=None,
                load_from_checkpoint_support=False,
                args=args,
                run=False,
                parser_kwargs={
                    "prog": f"lightning-bge {command}",
                    "description": description,
                    "exit_on_error": False,
                },
            )
        except (ArgumentError, ValueError) as error:
            raise ConfigError(
                f"{describe_option_error(str(error)).rstrip('.')}. See `lightning-bge {command} --help`"
            ) from error
        self.config: Namespace = self._cli.config
        self.config_init: Namespace = self._cli.config_init
        self.trainer = self._cli.trainer
        self._cli.model = self._cli.datamodule = None  # each trial has its own: these would only fill the memory
        for name in ("model", "data"):
            self.config_init.pop(name, None)
        warn_of_unused_callbacks(self.config_init.trainer.callbacks, command)

    @property
    def run_dir(self) -> Path:
        """The run's folder, which may not exist yet."""
        return Path(self.config_init.run_dir).expanduser()

    @property
    def experiment(self) -> ModuleExperiment:
        """The options of a study's trials, and how objects are made of them."""
        return ModuleExperiment(
            config=self.config,
            create=self._create,
            validate=self._cli.parser.validate,
            plain=partial(plain_config, self._cli.parser),
            monitor=self.config_init.monitor,
            run_dir=self.run_dir,
        )

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments of the trainer."""
        arguments: dict[str, Any] = self.config_init.trainer.as_dict()
        return arguments

    def _create(self, config: Namespace) -> TrialSetup:
        """Fresh objects of these options, with all random number generators seeded."""
        seed_everything(config.seed_everything, workers=True, verbose=False)
        cli = copy.copy(self._cli)  # whose `instantiate_classes` adds optimizers and schedulers of the options too
        cli.config = config
        cli.instantiate_classes()
        trainer = partial(module_trainer, self._trainer_class, cli.config_init.trainer.as_dict())
        return ModuleTrialSetup(cli.model, cli.datamodule, trainer, partial(fit_options, self._cli.parser, config))
