"""Options whose values are texts: what YAML makes of `no`, `01` or `1e3` never reaches them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from lightning_bge.errors import ConfigError


@dataclass(frozen=True)
class TextForm:
    """What an option accepts: one text, a list of texts, or either; and null.

    `beside` is another field of a dataclass that has `class_path` and `init_args`, with its default: the parser would
    take a mapping of these two alone for one that names another class than the dataclass.
    """

    one: bool = False
    several: bool = False
    null: bool = False
    beside: tuple[str, Any] | None = None

    def __or__(self, other: "TextForm") -> "TextForm":
        return TextForm(self.one or other.one, self.several or other.several, self.null or other.null)


def text_options(owners: Mapping[str, type]) -> dict[str, TextForm]:
    """The options that are texts, by their dotted names, as the annotations of constructors say.

    Args:
        owners: the beginning of the dotted names, and the class whose arguments they are; those of dataclasses among
            its arguments are found too.
    """
    found: dict[str, TextForm] = {}
    for prefix, owner in owners.items():
        hints = get_type_hints(owner.__init__)  # type: ignore[misc]
        hints.pop("return", None)
        for name, hint in hints.items():
            form = _form(hint)
            if is_dataclass(hint):
                found |= text_options({f"{prefix}.{name}": hint})  # type: ignore[dict-item]
                of_class, first = f"{prefix}.{name}.class_path", fields(hint)[0]
                if of_class in found:
                    found[of_class] = replace(found[of_class], beside=(first.name, first.default))
            elif form is not None and (form.one or form.several):
                found[f"{prefix}.{name}"] = form
    return found


def _form(hint: Any) -> TextForm | None:
    """None for an annotation that accepts something else than texts."""
    if hint is str:
        return TextForm(one=True)
    if hint is NoneType:
        return TextForm(null=True)
    origin, members = get_origin(hint), [one for one in get_args(hint) if one is not Ellipsis]
    if origin in (Union, UnionType):
        total = TextForm()
        for form in map(_form, members):
            if form is None:
                return None
            total |= form
        return total
    if isinstance(origin, type) and issubclass(origin, Sequence) and set(members) == {str}:
        return TextForm(several=True)
    return None


class _TextLoader(yaml.SafeLoader):
    """Every scalar is a text; merge keys are followed."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}  # noqa: RUF012


def load_texts(content: str) -> Any:
    """A YAML document whose scalars are all texts.

    Raises:
        yaml.YAMLError: it is no YAML.
        ConfigError: a mapping has a key twice, of which YAML's loaders keep the last without a word.
    """
    loader = _TextLoader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(root: yaml.Node) -> None:
    found, checked = [root], set[int]()
    while found:
        node = found.pop()
        if id(node) in checked or not isinstance(node, yaml.CollectionNode):  # an alias is the node that it stands for
            continue
        checked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            found += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            found.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"line {line}: the key {key.value} is there already, in line {lines[key.value]}. Keep one of them"
                )
            lines[key.value] = line


def text_loader(forms: Mapping[str, TextForm], load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML files like `load`, whose options that are texts have the texts that stand there."""

    def load_with_texts(content: str) -> Any:
        plain = load(content)
        return _replaced(plain, load_texts(content), forms, "") if isinstance(plain, dict) else plain

    return load_with_texts


def _replaced(plain: dict[Any, Any], texts: dict[str, Any], forms: Mapping[str, TextForm], prefix: str) -> Any:
    found = {}
    for key, value in plain.items():
        name, text = f"{prefix}{key}", texts.get(key)
        if name in forms and key in texts:
            found[key] = _as_texts(name, value, text, forms[name])
        elif isinstance(value, dict) and isinstance(text, dict):
            found[key] = _replaced(value, text, forms, f"{name}.")
        else:
            found[key] = value
    if "class_path" in found and found.keys() <= {"class_path", "init_args"}:
        form = forms.get(f"{prefix}class_path")
        found |= dict([form.beside]) if form is not None and form.beside is not None else {}
    return found


def _as_texts(name: str, plain: Any, text: Any, form: TextForm) -> Any:
    if plain is None and (form.null or not text):
        return None
    if plain == "null" and form.null and form.one:  # in quotes; the parser would take it for null
        raise ConfigError(f"{name}: expected another name than 'null', which stands for no value: rename it")
    return [text] if isinstance(text, str) and not form.one else text


def text_arguments(
    args: Sequence[str], forms: Mapping[str, TextForm], load: Callable[[str], Any] = yaml.safe_load
) -> list[str]:
    """Arguments of the command line whose lists of texts are JSON, of which no parser makes anything else.

    One text stands as it is: the parser does not interpret it. So `--data.text_columns text` is `["text"]`, and
    `--data.table.labels '[no, 01]'` is `["no", "01"]`. In `--data '{label_column: no}'` too.
    """
    found = list(args)
    for number, arg in enumerate(args):
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and equals:
            found[number] = f"--{name}={_argument(name, value, forms, load)}"
    for number, (arg, value) in enumerate(pairwise(args)):
        if arg.startswith("--") and "=" not in arg and not value.startswith("--"):
            found[number + 1] = _argument(arg.removeprefix("--"), value, forms, load)
    return found


def _argument(name: str, value: str, forms: Mapping[str, TextForm], load: Callable[[str], Any]) -> str:
    form = forms.get(name)
    within = form is None and any(known.startswith(f"{name}.") for known in forms)
    if not within and (form is None or not form.several):
        return value
    try:
        plain, text = load(value), load_texts(value)
    except yaml.YAMLError:
        plain = text = value
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if form is None:
        if not isinstance(plain, dict) or not isinstance(text, dict):
            return value
        return json.dumps(_replaced(plain, text, forms, f"{name}."), ensure_ascii=False)
    if isinstance(text, list):
        return json.dumps(text, ensure_ascii=False)
    if form.one or (plain is None and form.null) or value.startswith("["):  # the last is no YAML
        return value
    return json.dumps([value], ensure_ascii=False)
