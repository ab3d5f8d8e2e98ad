"""The parser of the options of commands that train or evaluate."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bge.cli.arguments import describe_argument_error, describe_unknown, did_you_mean
from lightning_bge.cli.texts import TextForm, load_texts, text_arguments, text_loader, text_options
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.option_errors import describe_option_error

TEXTS = text_options({"model": BGEClassifier, "data": TextDataModule}) | {
    name: TextForm(one=True) for name in ("run_dir", "output")
}
TEXTS |= {"json": TextForm(one=True, null=True), "keep": TextForm(several=True, null=True)}

A_SEED = "expected 0 ... 2**32 - 1"
_MODE = "yaml_with_texts"
set_loader(_MODE, text_loader(TEXTS, get_loader("yaml")), (yaml.YAMLError,))

# the type of an argument of WeightAveraging, written into the run's config.yaml and read from there
register_type(torch.device, serializer=str, deserializer=torch.device)


class OptionParser(LightningArgumentParser):
    """Lightning's parser, which takes texts as they stand, and whose errors are one line.

    Raises:
        ConfigError: by `parse_args`, where an option or a YAML file is wrong.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "parser_mode": _MODE, "allow_abbrev": False})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Namespace:
        """As jsonargparse's; lists of texts are never interpreted."""
        assert args is not None
        return super().parse_args(text_arguments(args, TEXTS, get_loader("yaml")), *others, **options)

    def parse_path(self, path: str | os.PathLike[str], *others: Any, **options: Any) -> Namespace:
        """As jsonargparse's; errors name the file."""
        try:
            found = super().parse_path(path, *others, **options)
            self._check_content(found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        self._drop_empty(found)
        return found

    def parse_string(self, content: str, *others: Any, **options: Any) -> Namespace:
        """As jsonargparse's; a document that is empty, or has empty sections alone, sets nothing."""
        with suppress(yaml.YAMLError):  # raised again by the parser
            texts = load_texts(content) or {}
            if isinstance(texts, dict) and all(value == "" for value in texts.values()):
                self._check_content(Namespace(dict.fromkeys(texts)))
                if texts.keys() <= self._sections():
                    content = "{}"
        return super().parse_string(content, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `ConfigError` in place of printing the usage; parsers within this one raise what it expects."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise ConfigError(self._describe(message)) from None

    def _describe(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            known = [f"--{name}" for name in self._names() | self._groups()]
            return describe_unknown(found[1].split(), known, self.prog)
        if found := re.match(r"Group '(.+)' does not accept option '(.+)'", message):
            return self._unknown(f"{found[1]}.{found[2]}")
        if found := re.match(r"(?:Option|Key) '(.+)' is not accepted", message):
            return self._unknown(found[1])
        if message.startswith("argument "):
            return describe_argument_error(message, self.prog)
        if message.startswith("Unexpected config"):
            return "expected a YAML mapping of options, such as `data: {batch_size: 32}`"
        text = describe_option_error(message)
        # Lightning's annotation accepts true and false, this program's seeds do not
        text = text.replace("seed_everything: expected true or false or a whole number", f"seed_everything: {A_SEED}")
        return f"{text}. See `{self.prog} --help`"

    def _unknown(self, name: str) -> str:
        return f"there is no option {name}. {did_you_mean(name, self._names() | self._groups(), self.prog)}"

    def _names(self) -> set[str]:
        """The dotted names of all options."""
        return {"config", "help", "print_config", *self.get_defaults(skip_validation=True).keys()}

    def _check_content(self, config: Namespace) -> None:
        """Refuse unknown names, and a value in the place of a mapping of options, which jsonargparse accepts."""
        known, groups = self._names(), self._groups()
        for name, value in config.items(branches=True):
            if name in groups and value is not None and not isinstance(value, Namespace | dict):
                raise ConfigError(f"{name}: expected a mapping of options, got {value!r}. See `{self.prog} --help`")
            if name not in groups and known.isdisjoint(_beginnings(name)):
                raise ConfigError(self._unknown(name))

    def _groups(self) -> set[str]:
        """The dotted names of what holds options, such as `data` and `data.table`."""
        return {name for one in self._names() for name in _beginnings(one)[:-1]}

    def _sections(self) -> set[str]:
        """The groups, and the options that are mappings or lists, whose default is an empty one."""
        defaults = self.get_defaults(skip_validation=True)
        return self._groups() | {name for name in self._names() if isinstance(defaults.get(name), dict | list)}

    def _drop_empty(self, config: Namespace) -> None:
        """Drop sections of which nothing is set, as where every line below is a comment: they have their defaults."""
        sections = self._sections()
        for name in [name for name, value in config.items(branches=True) if value is None and name in sections]:
            config.pop(name)


def _beginnings(name: str) -> list[str]:
    """`a.b.c` -> a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
