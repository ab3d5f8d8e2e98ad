"""How large a model is, and whether its files are there, without reading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import expand_home, prepare_classifier, quiet_transformers, why_not_loaded
from lightning_bge.models.head_class import HeadConfig, use_head
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.pooling import TokenPooling, set_pooling
from lightning_bge.runtime.model_config import read_config

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # and each with an index, for weights in several files


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a model's parameters.

    Attributes:
        parameters: all of them, fp32.
        trainable: those that have an optimizer's state.
    """

    parameters: int
    trainable: int

    @property
    def exported(self) -> int:
        """Bytes of the exported model."""
        return 4 * self.parameters

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, and AdamW's two means of each trainable one."""
        return 4 * self.parameters + 8 * self.trainable


def check_model(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Check that there is a model of this name, or a folder; what is in a folder is not looked at.

    Raises:
        ConfigError: there is neither, or the name is that of a file.
    """
    if not name_or_path.strip():
        raise ConfigError("model.name_or_path: expected a folder or the name of a model on the hub, got nothing")
    name = expand_home(name_or_path)
    if Path(name).is_file():
        raise ConfigError(f"model.name_or_path: {name} is a file. Name the folder that holds the model")
    if Path(name).is_dir():
        return
    if name.startswith((".", "/")):  # the hub is not asked for it
        raise ConfigError(why_not_loaded(name, FileNotFoundError()))
    try:
        with quiet_transformers():
            read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(name, error)) from error


def measure_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    frozen_layers: int | None = None,
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - frozen
    pooling: TokenPooling = "auto",
    head: HeadConfig = HeadConfig(),  # noqa: B008
) -> ModelSize:
    """Size of a classifier as `load_classifier` would load it; the arguments have the same meaning.

    Raises:
        ConfigError: there is no such model, files of it are missing or corrupt, or it does not go with an option.
    """
    name_or_path = expand_home(name_or_path)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            config = read_config(name_or_path, num_labels=1, **source)
        set_pooling(config, pooling)
        _check_weights(Path(name_or_path))
        with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.device("meta"):
            kind = AutoModelForSequenceClassification
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
        use_head(model, head, seed=0, any_width=True)  # the task is not known here
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(why_not_loaded(name_or_path, error)) from error
    with torch.device("meta"):
        options: dict[str, Any] = {"attention": "padded", "seed": 0, "gradient_checkpointing": False}
        net = prepare_classifier(model, frozen_layers=frozen_layers, lora=lora, **options)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    return ModelSize(sum(n for n, _ in counts), sum(n for n, trains in counts if trains))


def _check_weights(folder: Path) -> None:
    """Raise `OSError` or `SafetensorError` where a folder has no weights, or a file that is no whole one."""
    if not folder.is_dir():
        return  # of the hub
    if not any((folder / f"{name}{index}").is_file() for name in WEIGHTS for index in ("", ".index.json")):
        raise OSError(f"no file {' or '.join(WEIGHTS)} in it")
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt"):  # reads the header alone, and compares it with the length of the file
            pass
