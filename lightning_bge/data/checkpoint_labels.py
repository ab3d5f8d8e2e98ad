"""The classes that a checkpoint of transformers names, where nothing else names them."""

import logging
import re

from lightning_bge.data.tables.labels import positive_last
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.model_config import read_config
from lightning_bge.types import Task

log = logging.getLogger(__name__)


def checkpoint_labels(name_or_path: str, task: Task, revision: str | None, trust_remote_code: bool) -> tuple[str, ...]:
    """The names in a checkpoint's `id2label`, in the order of a model's outputs, and log them.

    Args:
        name_or_path: hub name or folder.
        task: binary, multiclass or multilabel.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code from the hub may run.

    Returns:
        The names; binary: (negative, positive). Empty where there is no checkpoint, or its names say nothing, such as
        `LABEL_0`.

    Raises:
        ConfigError: two outputs have the same name.
    """
    try:
        config = read_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # a tokenizer without a model; where there should be one, loading it says so
        return ()
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return ()
    if len(set(names)) < len(names):
        raise ConfigError(
            f"model.name_or_path: {name_or_path} has outputs of the same name, {', '.join(map(repr, names[:10]))}. "
            "Correct id2label in its config.json"
        )
    if task == "binary":
        if len(names) == 1:  # one logit, which the positive class names
            names = (f"not {names[0]}", *names)
        if len(names) != 2:
            return ()
        names = positive_last(names)
    shown = ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
    log_once(log, logging.INFO, f"the classes are those of {name_or_path}: {shown}; data.table.labels sets others")
    return names
