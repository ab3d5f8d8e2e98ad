"""Which options may be searched: those that change the model, and not what its score means.

A search maximises whatever raises the score. An option that changes the metric, or the rows that it is computed of, can
raise it without a better model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_bge.errors import ConfigError

SEEDS = ("seed_everything", "model.seed", "data.batching.seed")
VALIDATED = (
    *("data.split", "data.val_file", "data.table", "data.label_column", "data.group_column"),
    *("model.task", "data.task"),
)
TRAINING_ROWS = ("data.train_file", "data.table.max_rows")  # without a validation file also those that are validated on
UNUSED = ("data.test_file", "data.predict_file")
# The other options of the trainer change what is validated and when, or nothing of the model.
TRAINING = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches"),
    *("precision", "deterministic", "benchmark"),
)
ONE_STUDY_EACH = "Set it to one value; to compare several, run a study for each, and score each on the same test file"


def check_searchable(names: Iterable[str], configured: Callable[[str], Any], metric: str) -> None:
    """Refuse to search what changes the meaning of the score.

    Args:
        names: of the searched options, dotted.
        configured: an option's configured value, by its dotted name.
        metric: the metric of the study.

    Raises:
        ConfigError: names the option, the reason, and what to do instead.
    """
    for name in names:
        if (found := _refusal(name, configured, metric)) is not None:
            raise ConfigError(f"hpo.space: {name} can't be searched: {'. '.join(found)}")


def _refusal(name: str, configured: Callable[[str], Any], metric: str) -> tuple[str, str] | None:
    """Why an option can't be searched, and what to do instead; None: it can."""
    if _is_in(name, SEEDS):
        why = "scores of several seeds differ by chance, and the best of them is the luckiest"
        return why, "Remove it; hpo.seed_replicates trains the best trials with further seeds"
    if _is_in(name, TRAINING_ROWS) and configured("data.val_file") is not None:
        if metric != "loss" or configured("model.loss.class_weights") != "balanced":
            return None
        why = "monitor.metric is loss, and the balanced class weights in it follow from the training rows"
        return why, "Set monitor.metric to another metric, or model.loss.class_weights to null"
    if _is_in(name, (*VALIDATED, *TRAINING_ROWS)):
        return "it changes which rows are validated on, their labels or their groups", ONE_STUDY_EACH
    if _is_in(name, UNUSED):
        return "no trial uses it", "Set it to one value"
    if _is_in(name, ("model.loss",)) and metric == "loss":
        why = "monitor.metric is loss, so that it changes the metric for one and the same model"
        return why, f"Set monitor.metric to another metric, or {name} to one value"
    if name.startswith("trainer.") and not _is_in(name.removeprefix("trainer."), TRAINING):
        why = "it changes what is validated and when, or nothing of the model"
        return why, f"Set it to one value; of the trainer's options {', '.join(TRAINING)} can be searched"
    return None


def check_validation(found: str, configured: str, values: Mapping[str, Any], where: str) -> None:
    """Refuse values with which other rows, labels or groups are validated on: those that no rule on names has found.

    Args:
        found: `TextDataModule.validation_hash` with these values.
        configured: that of the configured options.
        values: by dotted names.
        where: begins the message.

    Raises:
        ConfigError: the hashes differ.
    """
    if found != configured:
        raise ConfigError(
            f"{where}: {', '.join(values)} can't be searched: with {dict(values)} other rows, labels or groups are "
            f"validated on than with the configured options. {ONE_STUDY_EACH}"
        )


def _is_in(name: str, options: Iterable[str]) -> bool:
    return any(name == option or name.startswith(f"{option}.") for option in options)
