"""Options as data: dotted names, overrides, and which of them must stay the same within one run."""

import copy
import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.callback_kinds import acting_callbacks

# An option, and another one that takes its value: the data module needs the model's; one seed draws head, dropout and
# order.
LINKS = (
    ("model.name_or_path", "data.tokenizer"),
    ("model.task", "data.task"),
    ("model.revision", "data.revision"),
    ("model.trust_remote_code", "data.trust_remote_code"),
    ("seed_everything", "model.seed"),
    ("seed_everything", "data.batching.seed"),
)
OF_STUDIES = ("hpo", "launcher", "ray")  # sections of options that a study has, and none of its trials
# Options that may change between two calls of a run: they do not change what a trial or an epoch is. Of the data the
# content counts, and not how it is read; another kind of device computes the same up to rounding. Their number is not
# among them: within an epoch a run goes on with as many as it had.
FREE = (
    *OF_STUDIES,
    *("run_dir", "config", "compile", "memory"),
    *("data.test_file", "data.predict_file", "data.cache_dir", "data.cache_gb"),
    *("data.table.format", "data.table.delimiter", "data.table.encoding", "data.table.quoting", "data.table.escape"),
    *(
        "trainer.accelerator",
        "trainer.strategy",
        "trainer.logger",
        "trainer.log_every_n_steps",
        "trainer.profiler",
        "trainer.default_root_dir",
    ),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.enable_checkpointing"),
    *("trainer.num_sanity_val_steps", "trainer.detect_anomaly", "trainer.deterministic", "trainer.benchmark"),
    *("data.batching.max_tokens", "data.batching.eval_max_tokens"),
    *("data.batching.num_workers", "data.batching.pin_memory", "data.batching.persistent_workers"),
)


def with_overrides(config: Namespace, overrides: dict[str, Any]) -> Namespace:
    """A copy of the options with some replaced by their dotted names, and the links followed.

    Besides what may be searched, `seed_everything` may be replaced, and with it head, dropout and order, but not the
    folds.
    """
    config = copy.deepcopy(config)
    for name, value in overrides.items():
        if name != "seed_everything":
            check_option(config, name)
        config[name] = value
    for source, target in LINKS if "model.name_or_path" in config else ():  # another project's module has none of them
        config[target] = config[source]
    return config


def check_option(config: Namespace, name: str) -> None:
    """Raise `ConfigError` unless `name` is an option of model, data or trainer, and not the target of a link."""
    linked = [target for _, target in LINKS]
    # arguments of a class are any names, of which those that are not given have the class's own defaults
    option, of_class, argument = name.partition(".init_args.")
    if of_class and argument.isidentifier() and f"{option}.class_path" in config:
        name = f"{option}.class_path"
    if name in config and name not in linked and name.split(".")[0] in ("model", "data", "trainer"):
        return
    known = [key for key, _ in config.items() if key not in linked]
    near = sorted(key for key in known if key.split(".")[0] == name.split(".")[0])
    raise ConfigError(
        f"hpo.space: there is no option {name}. "
        + (f"Options with such a beginning: {', '.join(near)}" if near else "Expected model.*, data.* or trainer.*")
    )


def configured_value(config: Namespace, name: str) -> Any:
    """The value of an option; None for an argument of a class that is not given, as the class has its own default.

    Raises:
        KeyError: there is no such option.
    """
    option, of_class, argument = name.partition(".init_args.")
    return dict(config[f"{option}.init_args"]).get(argument) if of_class else config[name]


def plain_config(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options as plain data that the same parser can read."""
    return json.loads(parser.dump(config, format="json", skip_unset=False, skip_validation=True))


# options of which the content of what is read counts
BY_CONTENT = ("data.train_file", "data.val_file", "data.table.labels")


def comparable(config: dict[str, Any], searched: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted name -> value, of the options that must not change within one run.

    Of the trainer's callbacks those that change nothing of what is trained are left out.
    """
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            flat[prefix] = node

    walk("", config)
    flat["trainer.callbacks"] = acting_callbacks(flat.get("trainer.callbacks"))
    free = (*FREE, *searched)
    return {name: value for name, value in flat.items() if not any(name == f or name.startswith(f"{f}.") for f in free)}
