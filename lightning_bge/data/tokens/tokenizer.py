"""Load a tokenizer, identify it by a hash, and find its length limit."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.model_config import read_tokenizer

log = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer by name or folder.

    Raises:
        DataError: no such folder or name, a folder without tokenizer files, or a tokenizer without a fast version.
    """
    name = str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path
    folder = Path(name)
    if not name:
        raise ConfigError("tokenizer is empty: name a tokenizer, or a model folder that holds one")
    if not folder.is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise DataError(f"tokenizer folder {name} does not exist")
    remedy = f"Save the tokenizer there (tokenizer.save_pretrained({name!r})), or name another model"
    try:
        tokenizer = read_tokenizer(name, revision, trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise many types, bare Exception among them
        if folder.is_dir():
            raise DataError(f"folder {name} holds no usable tokenizer ({_first_line(error)}). {remedy}") from error
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {_first_line(error)} Check the spelling and the network, "
            "or give a folder that holds it"
        ) from error
    # For a folder with a config.json alone transformers builds a tokenizer that has only special tokens.
    files = set(tokenizer.vocab_files_names.values())
    if folder.is_dir() and files and not any((folder / file).is_file() for file in files):
        raise DataError(f"folder {name} holds no tokenizer (none of {', '.join(sorted(files))}). {remedy}")
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {name!r} ({type(tokenizer).__name__}) has no fast version, which is required: "
            "convert it to a tokenizer.json, or name another model"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sha256 (hex) of what decides which tokens a fast tokenizer makes; independent of its path and past calls."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with truncation or padding leave their options behind; ours are passed with each call.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    content = {
        "backend": backend,
        "class": type(tokenizer).__name__,
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "truncation_side": tokenizer.truncation_side,
        "inputs": list(tokenizer.model_input_names),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def effective_max_length(tokenizer: Any, max_length: int, pair: bool) -> int:
    """The length limit, lowered to what the tokenizer's model takes.

    Raises:
        ConfigError: nothing of the text would be left besides the special tokens.
    """
    length = min(max_length, tokenizer.model_max_length)
    if length < max_length:
        log.info("max_length lowered from %d to %d, the limit of the tokenizer", max_length, length)
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if length < special + 1 + pair:
        raise ConfigError(f"max_length must be at least {special + 1 + pair} ({special} special tokens), got {length}")
    return int(length)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"
