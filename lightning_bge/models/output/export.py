"""A trained classifier as a folder that transformers and sentence-transformers load without this package."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier, quiet_transformers
from lightning_bge.models.head_class import head_of
from lightning_bge.models.memory_saving.lora import merged_weights
from lightning_bge.models.output.model_card import write_model_card
from lightning_bge.models.pooling import is_native
from lightning_bge.runtime.model_config import HEAD_FILE, as_exported, is_head
from lightning_bge.types import SCHEMA_FILE, Schema


def export_classifier(
    net: TextClassifier,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base_model: str | None = None,
) -> Path:
    """Write weights, configuration, tokenizer, label schema and model card; the arguments stay unchanged.

    The tokenizer's length limit is set to the one trained with, so that texts are truncated as in training. The folder
    appears whole or not at all; an older one is replaced. LoRA's factors are merged into the weights that are written.
    With a pooling or a head that transformers' model does not have, `config.json` names an architecture of this
    package, which transformers and sentence-transformers refuse: they would compute other scores.

    Args:
        net: the encoder with its head.
        schema: what the outputs mean; written as `lightning_bge.json`.
        tokenizer: the one the texts were tokenised with; a copy with the length limit is saved.
        folder: where to.
        base_model: what was fine-tuned, for the model card, which names it if it came from the hub.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder holds something else than an exported model, which would be deleted.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _describe_outputs(net.model.config, schema)
        with quiet_transformers():
            weights = merged_weights(net.model)
            if (head := head_of(net.model.config).class_path) is not None:
                own = {name: weights.pop(name).clone().contiguous() for name in list(weights) if is_head(name)}
                save_file({name.removeprefix("classifier."): value for name, value in own.items()}, draft / HEAD_FILE)
            net.model.save_pretrained(draft, state_dict=weights)
        native = is_native(net.model.config)
        if not native:
            path = draft / "config.json"
            path.write_text(json.dumps(as_exported(json.loads(path.read_text())), indent=2) + "\n")
        save_tokenizer(tokenizer, schema, draft)
        schema.save(draft)
        write_model_card(draft, schema, base_model, peers=native, head_class=head)
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, schema: Schema, folder: Path) -> None:
    """Write a copy of the tokenizer with the length limit that was trained with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = schema.max_length
    tokenizer.save_pretrained(folder)


def replace_folder(draft: Path, folder: Path) -> None:
    """Give a whole folder its name; an older exported model is deleted.

    Raises:
        ConfigError: the folder holds something else than an exported model, which would be deleted.
    """
    check_replaceable(folder)
    old = folder.with_name(f".{folder.name}-{draft.name}-old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
    if folder.exists():
        os.replace(folder, old)  # not deleted: a process that is killed meanwhile would leave a part of it
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise `ConfigError` where a folder holds something else than an exported model."""
    if folder.exists() and not (folder / SCHEMA_FILE).is_file():
        raise ConfigError(f"{folder} exists and is no exported model: name another folder, or delete that one")


def _describe_outputs(config: Any, schema: Schema) -> None:
    """Put into a model's configuration what the outputs mean: names, and which function makes a score of a logit."""
    config.problem_type = {
        "binary": None,  # one logit with a sigmoid: transformers has no name for it
        "regression": "regression",
        "multiclass": "single_label_classification",
        "multilabel": "multi_label_classification",
    }[schema.task]
    if schema.task in ("multiclass", "multilabel"):
        config.id2label = dict(enumerate(schema.labels))
    else:
        config.id2label = {0: schema.labels[1] if schema.labels else "score"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    sigmoid = schema.task in ("binary", "multilabel")
    activation = "torch.nn.modules.activation.Sigmoid" if sigmoid else "torch.nn.modules.linear.Identity"
    config.sentence_transformers = {"activation_fn": activation}
