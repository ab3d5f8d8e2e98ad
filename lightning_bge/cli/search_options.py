"""The options under `--hpo`, which `hpo`, `plan` and `audit` read, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.lightning_cli import BGECLI
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.parameter_sets import complete_point, ends, parse_points, points_to_check
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.runtime.dotted_config import check_setting

Options = TypeVar("Options", bound=Any)


def add_hpo(parser: LightningArgumentParser) -> None:
    """The study's options."""
    parser.add_argument("--hpo", type=StudyConfig, default=StudyConfig(), help="The study.")


def add_hpo_and(options: type) -> Any:
    """The study's options and those of a dataclass, the latter without a prefix."""

    def add(parser: LightningArgumentParser) -> None:
        add_hpo(parser)
        parser.add_class_arguments(options, sub_configs=True)

    return add


def own_options(cli: BGECLI, kind: type[Options]) -> Options:
    """The command's own options, as `add_hpo_and` added them."""
    return kind(**{name: cli.config_init[name] for name in kind.__dataclass_fields__})


def check_one_device(cli: BGECLI, fix: str) -> None:
    """Raise `ConfigError` where the trainer has several devices."""
    if cli.trainer.world_size > 1:
        raise ConfigError(
            f"trainer.devices: expected 1 for lightning-bge {cli.command}, got {cli.trainer.world_size}. {fix}"
        )


def check_search(cli: BGECLI, hpo: StudyConfig, space: Space) -> None:
    """Try the ends of the search space and the enqueued parameter sets, before a study exists."""
    points, config = parse_points(hpo.enqueue, space), cli.config
    for name in space:
        check_setting(config, name)
    for settings in points_to_check(space, config.get):
        cli.check(settings)
    for point in points:
        cli.check(complete_point(space, point, config.get), "hpo.enqueue")


def most_epochs(config: Namespace, space: Space) -> int:
    """The most epochs that any trial trains a fold for."""
    if any(name.startswith("data.split.") for name in space):
        raise ConfigError("hpo.space: data.split can't be searched: trials on different folds are not comparable")
    searched = ends(space["trainer.max_epochs"]) if "trainer.max_epochs" in space else ()
    if searched and "trainer.max_epochs" not in space.when:
        return max(searched)
    if config.trainer.max_epochs is None or config.trainer.max_epochs < 1:
        raise ConfigError(f"trainer.max_epochs: a search needs 1 or more, got {config.trainer.max_epochs}")
    return max([config.trainer.max_epochs, *searched])


def encoder_cache(cli: BGECLI, hpo: StudyConfig) -> EncoderCache:
    """What a search loads its encoders with."""
    granted = cli.config_init.memory.limit_gb
    return EncoderCache(hpo.encoder_cache_bytes, None if granted is None else round(granted * 2**30))


def writable(path: str | None) -> Path | None:
    """A file to write later; its folder is made now, before anything is measured for minutes."""
    if path is None:
        return None
    found = Path(path).expanduser()
    found.parent.mkdir(parents=True, exist_ok=True)
    return found
