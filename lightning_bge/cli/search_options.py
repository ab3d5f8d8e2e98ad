"""The options under `--hpo`, which `hpo`, `plan` and `audit` read."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.class_paths import names_a_class
from lightning_bge.cli.lightning_cli import BGECLI
from lightning_bge.cli.module_cli import ModuleCLI
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.config import LauncherName, RayConfig
from lightning_bge.hpo.module_experiment import without_refit
from lightning_bge.hpo.scheduling.trial_loop import StartAgainError
from lightning_bge.runtime.output_file import write_output_text
from lightning_bge.runtime.run_folder import json_text

SPENT = "LIGHTNING_BGE_SPENT_SECONDS"  # environment variable: of a process before it has started itself again
_STARTED_IN, _STARTED = os.getcwd(), time.monotonic()
Options = TypeVar("Options", bound=Any)


def add_hpo(parser: LightningArgumentParser) -> None:
    """The study's options."""
    parser.add_argument("--hpo", type=StudyConfig, default=StudyConfig(), help="The study.")
    text = "Where lightning-bge hpo starts its workers: on this machine, or on a Ray cluster."
    parser.add_argument("--launcher", type=LauncherName, default="local", help=text)
    parser.add_argument("--ray", type=RayConfig, default=RayConfig(), help="Workers on a Ray cluster.")


def study_cli(args: list[str], *, description: str) -> BGECLI | ModuleCLI:
    """Read the options of a study: of our classes, or of those that the options name."""
    kind = ModuleCLI if names_a_class(args) else BGECLI
    return kind("hpo", args, description=description, add_arguments=add_hpo)


def options_of_study(cli: BGECLI | ModuleCLI) -> StudyConfig:
    """Those under `hpo`, with what is left of the time; without a refit for a module that is not ours."""
    hpo = within_time(cli.config_init.hpo)
    return without_refit(hpo) if isinstance(cli, ModuleCLI) else hpo


def add_hpo_and(options: type) -> Any:
    """The study's options and those of a dataclass, the latter without a prefix."""

    def add(parser: LightningArgumentParser) -> None:
        add_hpo(parser)
        parser.add_class_arguments(options, sub_configs=True)

    return add


def own_options(cli: BGECLI | ModuleCLI, kind: type[Options]) -> Options:
    """The command's own options, as `add_hpo_and` added them."""
    return kind(**{name: cli.config_init[name] for name in kind.__dataclass_fields__})


@contextmanager
def starting_again() -> Iterator[None]:
    """Start the process again where it holds memory of a trial that ran out of it."""
    try:
        yield
    except StartAgainError as error:
        print(f"lightning-bge: {error}. The process starts itself again", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os.chdir(_STARTED_IN)  # the paths of the command line are relative to it
        os.environ[SPENT] = str(time.monotonic() - _STARTED + float(os.environ.get(SPENT, 0.0)))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def within_time(hpo: StudyConfig) -> StudyConfig:
    """The options with what is left of `hpo.timeout`, where the process has started itself again."""
    spent = float(os.environ.get(SPENT, 0.0))
    return hpo if hpo.timeout is None or not spent else replace(hpo, timeout=max(hpo.timeout - spent, 0.001))


def check_one_device(cli: BGECLI | ModuleCLI, fix: str) -> None:
    """Raise `ConfigError` where the trainer has several devices."""
    if cli.trainer.world_size > 1:
        raise ConfigError(
            f"trainer.devices: expected 1 for lightning-bge {cli.command}, got {cli.trainer.world_size}. {fix}"
        )


def write_output(path: str | None, content: dict[str, Any]) -> None:
    """Write a JSON file where one is asked for, and make its folder."""
    if path is not None:
        write_output_text(path, json_text(content))
