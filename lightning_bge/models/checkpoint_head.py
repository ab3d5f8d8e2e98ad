"""The head of a checkpoint of transformers, and how its outputs become those of a task."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.model_config import HEAD
from lightning_bge.types import Task

MAX_NAMES = 10  # that a message lists
# What transformers' `problem_type` says of how a head was trained, and the tasks that this suits, by its width.
TRAINED_FOR: dict[str, tuple[str, ...]] = {
    "regression": ("regression",),
    "single_label_classification": ("binary", "multiclass"),
    "multi_label_classification": ("multilabel",),
}


@dataclass(frozen=True)
class Outputs:
    """What the outputs of a head mean.

    Attributes:
        task: binary, multiclass, multilabel or regression.
        labels: names in the order of the outputs; binary: (negative, positive); regression: ().
    """

    task: Task
    labels: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Width of the last layer."""
        return 1 if self.task in ("binary", "regression") else len(self.labels)


@dataclass(frozen=True)
class HeadMatch:
    """How a checkpoint's head serves for some outputs.

    Attributes:
        matrix: float [outputs, outputs of the head], which makes logits of the head's logits; None: it does not serve.
        why_not: the reason, which follows the name of the checkpoint in a sentence.
        remedy: what a user can do about it.
        note: how the outputs were taken, where their names do not say so; a user should read it.
    """

    matrix: Tensor | None
    why_not: str = ""
    remedy: str = ""
    note: str = ""


def has_head(config: PretrainedConfig) -> bool:
    """Whether a checkpoint may hold a classification head, by its configuration alone."""
    names = config.architectures
    return not names or any("ForSequenceClassification" in name for name in names)


def match_head(config: PretrainedConfig, outputs: Outputs) -> HeadMatch:
    """Match the outputs of a checkpoint's head with those that are wanted, by their names.

    Two logits of a binary checkpoint become their difference, whose sigmoid is their softmax. Names such as `LABEL_0`
    say nothing: the wanted order is taken, and said.

    Args:
        config: of the checkpoint, with its own number of outputs and `id2label`.
        outputs: the wanted ones.
    """
    width, task = config.num_labels, outputs.task
    names = [str((config.id2label or {}).get(number, f"LABEL_{number}")) for number in range(width)]
    trained_for = TRAINED_FOR.get(config.problem_type or "", (task,))
    if width == 1 and config.problem_type == "multi_label_classification":
        trained_for = ("binary",)  # one logit with a sigmoid
    if task not in trained_for:
        why = f"has a head for {config.problem_type}, and the task is {task}"
        return HeadMatch(None, why, f"Set model.task to {' or '.join(trained_for)}")
    if len(set(names)) < width:
        why = f"has outputs of the same name, {_shown(names)}"
        return HeadMatch(None, why, "Correct id2label in its config.json")
    if task == "regression":
        return HeadMatch(torch.eye(1)) if width == 1 else _other_width(names, outputs)
    if task == "binary":
        return _match_binary(names, outputs)
    if width != outputs.count:
        return _other_width(names, outputs)
    places, note = _match_names(names, outputs.labels)
    if places is None:
        return _other_names(names, outputs)
    return HeadMatch(torch.eye(width)[places], note=note)


def _match_binary(names: Sequence[str], outputs: Outputs) -> HeadMatch:
    if len(names) == 2:
        places, note = _match_names(names, outputs.labels)
        if places is None:
            return _other_names(names, outputs)
        negative, positive = torch.eye(2)[places]
        return HeadMatch((positive - negative)[None], note=note)
    if len(names) != 1:
        return _other_width(names, outputs)
    keys = [_key(label) for label in outputs.labels]
    sign = 1.0 if _key(names[0]) == keys[1] else -1.0
    if _key(names[0]) in keys and keys[0] != keys[1]:
        return HeadMatch(torch.full((1, 1), sign))
    if not _are_generic(names):
        return _other_names(names, outputs)
    return HeadMatch(torch.eye(1), note=f"its one output is taken as the score of {outputs.labels[1]!r}")


def _match_names(names: Sequence[str], labels: Sequence[str]) -> tuple[list[int] | None, str]:
    """The place of each label among the head's names, and what to say of it; None: they are other names."""
    if set(names) == set(labels):
        return [names.index(label) for label in labels], ""
    keys, wanted = [_key(name) for name in names], [_key(label) for label in labels]
    if set(keys) == set(wanted) and len(set(keys)) == len(names):
        return [keys.index(key) for key in wanted], f"its classes {_shown(names)} are taken as {_shown(labels)}"
    if _are_generic(names) and len(names) == len(labels):
        return list(range(len(names))), f"its outputs {_shown(names)} are taken as {_shown(labels)}, in this order"
    return None, ""


def _key(name: str) -> str:
    """Without case and blanks, and in the form that labels of files have: 1 for True, composed characters."""
    key = "".join(unicodedata.normalize("NFC", name).casefold().split())
    return {"true": "1", "1.0": "1", "false": "0", "0.0": "0"}.get(key, key)


def _are_generic(names: Sequence[str]) -> bool:
    """Whether these are numbers alone: transformers' own names, or those of a data set without names."""
    return all(re.fullmatch(rf"(LABEL_)?{number}", name) for number, name in enumerate(names))


def _other_width(names: Sequence[str], outputs: Outputs) -> HeadMatch:
    needed = "1 or 2" if outputs.task == "binary" else str(outputs.count)
    data = f", {_shown(outputs.labels)}" if outputs.task in ("multiclass", "multilabel") else ""
    why = f"has a head of {len(names)} outputs, {_shown(names)}, and a {outputs.task} task of these data has {needed}"
    return HeadMatch(None, why + data, "Set model.task and data.table.labels to what it was trained for")


def _other_names(names: Sequence[str], outputs: Outputs) -> HeadMatch:
    why = f"has a head for the classes {_shown(names)}, and those of the data are {_shown(outputs.labels)}"
    return HeadMatch(None, why, "Set data.table.labels to its classes, or correct id2label in its config.json")


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:MAX_NAMES]) + more


# ---------------------------------------------------------------------- the last layer


def find_last_layer(model: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """The last linear layer behind the encoder, with its name; None: there is none."""
    inside = {id(module) for module in model.base_model.modules()}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [(name, module) for name, module in layers if id(module) not in inside]
    return found[-1] if found and found[-1][1].out_features == model.config.num_labels else None


@torch.no_grad()
def rearrange_outputs(model: PreTrainedModel, matrix: Tensor) -> None:
    """Multiply the weights of the last layer with a matrix [outputs, outputs of the head], in place.

    Raises:
        ConfigError: the outputs are not those of a linear layer.
    """
    if torch.equal(matrix, torch.eye(len(matrix))):
        return
    found = None if hasattr(model.config, HEAD) else find_last_layer(model)
    if found is None:
        raise ConfigError(
            f"model.name_or_path: the outputs of this {model.config.model_type} can't be brought into the order of the "
            "data, as its last layer is not linear, or its head is one by a class path. Set data.table.labels to "
            "the order of id2label in its config.json"
        )
    name, old = found
    new = nn.Linear(old.in_features, len(matrix), bias=old.bias is not None, dtype=old.weight.dtype)
    new.weight.copy_(matrix @ old.weight)
    if old.bias is not None:
        new.bias.copy_(matrix @ old.bias)
    model.set_submodule(name, new)
    model.config.num_labels = model.num_labels = len(matrix)


@torch.no_grad()
def reset_head(model: PreTrainedModel) -> None:
    """Draw new weights for the last layer, as transformers does; where it is not linear, its weights stay."""
    found = find_last_layer(model)
    if found is None:
        return
    found[1].weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
    if found[1].bias is not None:
        found[1].bias.zero_()
