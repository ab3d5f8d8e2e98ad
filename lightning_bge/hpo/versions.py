"""What the processes of a study compute with. A long study may see an upgrade: that is noted, and not refused."""

import logging
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import optuna
import torch

from lightning_bge.callbacks.torch_backends import chosen_device
from lightning_bge.hpo.trials import COMPUTED_WITH

LIBRARIES = ("torch", "transformers", "tokenizers")  # whose numerics a score depends on
log = logging.getLogger("lightning_bge")


def used_versions(accelerator: str = "auto") -> dict[str, str]:
    """The libraries and the device of this process, as equal ones compute equal scores.

    Args:
        accelerator: the trainer's.
    """
    device = chosen_device(accelerator)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
    return {library: version(library) for library in LIBRARIES} | {"device": name}


def other_versions(study: optuna.Study, versions: Mapping[str, str]) -> dict[str, str]:
    """Those of this process that differ from the study's first one; a warning says so."""
    first = study.user_attrs.get(COMPUTED_WITH, {})
    other = {name: value for name, value in versions.items() if first.get(name, value) != value}
    if other:
        log.warning(
            "the first process of this study computed with %s, this one with %s: scores of equal parameter sets may "
            "differ a little. Trials of this process have the user attribute %s",
            _describe({name: first[name] for name in other}),
            _describe(other),
            COMPUTED_WITH,
        )
    return other


def count_versions(study: optuna.Study) -> dict[str, Any]:
    """What the study's first process computed with, and how many trials each other combination has computed."""
    trials = study.get_trials(deepcopy=False)
    found = Counter(tuple(sorted(trial.user_attrs.get(COMPUTED_WITH, {}).items())) for trial in trials)
    others = [{"n_trials": n, "versions": dict(items)} for items, n in found.items() if items]
    return {"first": study.user_attrs.get(COMPUTED_WITH, {}), "others": others}


def describe_versions(found: Mapping[str, Any]) -> list[str]:
    """Lines for a user about what `count_versions` returns: none where all trials were computed with the same."""
    first = found["first"]
    return [
        f"{one['n_trials']} of the trials: computed with {_describe(one['versions'])} instead of "
        f"{_describe({name: first[name] for name in one['versions']})}, which the study began with "
        f"(trials.csv: {COMPUTED_WITH})"
        for one in found["others"]
    ]


def _describe(versions: Mapping[str, str]) -> str:
    return ", ".join(value if name == "device" else f"{name} {value}" for name, value in versions.items())
