"""The configuration of a transformers model, of an exported model that transformers can't express too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

POOLING = "lightning_bge_pooling"  # attribute of a configuration: how token vectors are pooled, if not as transformers
HEAD = "lightning_bge_head"  # and the class and arguments of a head that is not one of transformers
HEAD_FILE = "head.safetensors"  # its weights in an exported model: `classifier` would be taken for transformers' own
OWN_TYPE = "lightning_bge"
"""The `model_type` of an exported model with such a pooling or head: transformers and sentence-transformers refuse to
load it, where they would otherwise compute other scores without a word."""
REAL_TYPE = "lightning_bge_model_type"


def read_config(name_or_path: str, **options: Any) -> PretrainedConfig:
    """As `AutoConfig.from_pretrained`, for exported models of `OWN_TYPE` too.

    Args:
        name_or_path: hub name or folder.
        options: `revision`, `trust_remote_code`, and attributes that are replaced, as for `from_pretrained`.

    Raises:
        OSError: there is no such model.
        ValueError: it has no known architecture.
    """
    from transformers import AutoConfig, PretrainedConfig  # slow to import

    try:
        return AutoConfig.from_pretrained(name_or_path, **options)
    except ValueError:
        found, _ = PretrainedConfig.get_config_dict(name_or_path, revision=options.get("revision"))
        if found.get("model_type") != OWN_TYPE:
            raise
    content = {name: value for name, value in found.items() if name not in ("model_type", REAL_TYPE)}
    changes = {name: value for name, value in options.items() if name not in ("revision", "trust_remote_code")}
    if "num_labels" in changes and changes["num_labels"] != len(content.get("id2label", {})):
        of_outputs = ("id2label", "label2id", "problem_type")
        content = {name: value for name, value in content.items() if name not in of_outputs}
    return AutoConfig.for_model(found[REAL_TYPE], **{**content, **changes})


def read_tokenizer(name_or_path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """As `AutoTokenizer.from_pretrained`, which chooses a class by the model's type, for folders of `OWN_TYPE` too."""
    from transformers import AutoTokenizer  # slow to import

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = Path(name_or_path, "config.json")
    if path.is_file() and f'"{OWN_TYPE}"' in path.read_text(encoding="utf-8"):
        options["config"] = read_config(name_or_path)
    return AutoTokenizer.from_pretrained(name_or_path, **options)


def as_exported(config: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds: with `OWN_TYPE` where transformers would pool otherwise, or has no such head."""
    if POOLING not in config and HEAD not in config:
        return config
    return {**config, "model_type": OWN_TYPE, REAL_TYPE: config["model_type"]}


def is_head(name: str) -> bool:
    """Whether a parameter or module of this name, in a model of transformers or a `TextClassifier`, is in a head."""
    return name.removeprefix("model.").partition(".")[0] == "classifier"
