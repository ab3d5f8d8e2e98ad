"""Which classes arguments and YAML files name, before a parser has read them."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from lightning_bge.cli.arguments import named_values
from lightning_bge.runtime.compat.lightning import package_of


def names_a_class(args: list[str]) -> bool:
    """Whether arguments or YAML files name the class of the module or of the data module, as for LightningCLI."""
    return any(True for _ in _class_paths(args))


def _class_paths(args: list[str]) -> Iterator[str]:
    for name, value in named_values(args):
        if name in ("-c", "--config"):
            if not Path(value).expanduser().is_file():
                continue  # the parser says what is wrong
            content = yaml.safe_load(Path(value).expanduser().read_text(encoding="utf-8"))
            for section in ("model", "data"):
                found = content.get(section) if isinstance(content, dict) else None
                path = found.get("class_path") if isinstance(found, dict) else found
                if isinstance(path, str):
                    yield path
        elif name in ("--model", "--data", "--model.class_path", "--data.class_path") and not value.startswith("{"):
            yield value


def package_of_classes(args: list[str]) -> str:
    """The package that the classes are of."""
    found = "lightning.pytorch"
    for path in _class_paths(args):
        module, _, name = path.rpartition(".")
        try:
            found = package_of(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError, ValueError):
            continue  # the parser says what is wrong
    return found
