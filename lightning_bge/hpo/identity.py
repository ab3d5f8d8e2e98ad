"""What a study's trials have in common: their options, and the content of their files, tokenizers and labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from jsonargparse import Namespace

from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.parameter_sets import complete_parameter_set, ends
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.study import CONTENT
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.runtime.callback_kinds import NOT_IN_TRIALS, acting_callbacks
from lightning_bge.runtime.dotted_config import BY_CONTENT, comparable, configured_value

TOKENIZER_OPTIONS = ("model.name_or_path", "model.revision", "model.trust_remote_code")
HASH_DIGITS = 16  # hexadecimal ones, which a message can show


class TextStudy(Protocol):
    """What is needed of a `TextExperiment`, whose attributes these are."""

    @property
    def config(self) -> Namespace:
        """All options."""

    @property
    def plain(self) -> Callable[[Namespace], dict[str, Any]]:
        """Turns options into plain data."""

    @property
    def monitor(self) -> MonitorConfig:
        """The metric."""

    @property
    def datamodule(self) -> TextDataModule:
        """Set up for `fit`."""

    def build(self, overrides: dict[str, Any]) -> TextTrialSetup:
        """Fresh objects."""


def text_identity(experiment: TextStudy, hpo: StudyConfig, space: Space) -> dict[str, Any]:
    """The options that must be equal for trials to be comparable, and what is read, by content.

    A searched option is only among them if it is conditional. A file that was moved or copied is the same one.

    Args:
        experiment: with its data set up for `fit`.
        hpo: the options of the study.
        space: the search space.

    Raises:
        UserError: the test file is wrong.
    """
    always_drawn = tuple(name for name in space if name not in space.when)
    options = comparable(experiment.plain(experiment.config), (*BY_CONTENT, *always_drawn))
    options["trainer.callbacks"] = acting_callbacks(
        options["trainer.callbacks"], NOT_IN_TRIALS
    )  # a study has none of them
    # else workers in bf16, fp16 and fp32 would share a study
    precision = choose_precision(str(experiment.config.get("trainer.accelerator", "auto")))[0]
    if options.get("trainer.precision") == "auto":
        options["trainer.precision"] = precision
    if "trainer.precision" in space and "auto" in ends(space["trainer.precision"]):
        options[f"trainer.precision=auto{CONTENT}"] = precision
    if hpo.reports_per_epoch > 1:
        options["hpo.val_check_interval"] = hpo.val_check_interval
    options["monitor.metric"] = experiment.monitor.name  # a class has its path and arguments besides
    return options | _content(experiment, hpo, space)


def _content(experiment: TextStudy, hpo: StudyConfig, space: Space) -> dict[str, Any]:
    """What is read, with the configured options and with each searched one that changes what is read."""
    configured = _content_of(experiment.datamodule, hpo)
    found = configured | _tokenizer_of(experiment.datamodule)
    configured_options = partial(configured_value, experiment.config)
    for name in space:
        if not (name.startswith("data.") or name in TOKENIZER_OPTIONS):
            continue
        for value in ends(space[name]):
            data = experiment.build(complete_parameter_set(space, {name: value}, configured_options)).datamodule
            changed = {key: content for key, content in _content_of(data, hpo).items() if content != configured[key]}
            found |= {key.replace(CONTENT, f" with {name}={value}{CONTENT}"): one for key, one in changed.items()}
            found |= _tokenizer_of(data)
    return found


def _content_of(data: TextDataModule, hpo: StudyConfig) -> dict[str, Any]:
    assert data.schema is not None
    found = {
        f"data.train_file{CONTENT}": _shown(data.data_hash),
        f"data.val_file{CONTENT}": _shown(data.val_hash),
        f"data.split{CONTENT}": _shown(data.folds_hash),
        f"labels{CONTENT}": list(data.schema.labels),
    }
    if hpo.refit and data.test_file is not None:  # it is not read otherwise, and may be added later
        found[f"data.test_file{CONTENT}"] = _shown(data.test_hash())
    return found


def _tokenizer_of(data: TextDataModule) -> dict[str, Any]:
    version = "" if data.revision is None else f" at {data.revision}"
    return {f"tokenizer of {data.tokenizer}{version}{CONTENT}": _shown(data.tokenizer_hash)}


def _shown(digest: str | None) -> str | None:
    return None if digest is None else f"sha256 {digest[:HASH_DIGITS]}"
