"""What jsonargparse says about a wrong option, in one line."""

import ast
import re

NAMES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
    "<class 'dict'>": "a mapping",
    "<class 'list'>": "a list",
    "<class 'tuple'>": "a list",
}
OF_PARSER = ("Expected ", "Not a valid ", "Parser key ", "Problem with ", "Import path ", "Does not validate ")
_LENGTH = 100  # characters that are shown of a value


def describe_option_error(message: str) -> str:
    """One line with the option, what was expected and what came, of an error message of jsonargparse.

    Args:
        message: of several lines, with the names of Python's types. One of another form is only joined into one line.
    """
    if of_link := re.search(r"compute_fn of link .* failed: (.*)", message, re.DOTALL):
        return of_link[1]
    keys = re.findall(r'^\s*(?:- )?Parser key "([^"]+)"', message, re.MULTILINE)
    if in_class := _of_class(message):
        return ": ".join([*keys[:1], in_class])
    if found := _of_type(message) or _of_config(message):
        return ": ".join([*keys[-1:], found])
    return " ".join(message.split())


def _of_class(message: str) -> str:
    """An error within a class that is named by `class_path`."""
    pattern = r"Problem with given class_path '([^']+)':\s*\n(.*?)(?=\n\s*- (?:Not|Expected|Problem)|\n  Given|\Z)"
    if found := re.search(pattern, message, re.DOTALL):
        return f"class_path {found[1]}: {describe_option_error(found[2])}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"expected the class path of a {found[2]}, got {found[1]}"
    made = re.search(r"Given value: \S*class_path='([^']+)'", message)
    own = [text for text in re.findall(r"^\s*- (.+)$", message, re.MULTILINE) if not text.startswith(OF_PARSER)]
    return f"class_path {made[1]}: {own[0]}" if made and own else ""  # what the class's constructor says


def _of_type(message: str) -> str:
    expected, got = [], ""
    for kind, value in re.findall(r"Expected an? (.+?)(?:\. Got value: (.*))?$", message, re.MULTILINE):
        expected.append(_type_name(kind))
        got = value or got
    if subclass := re.search(r"Not a valid subclass of (\w+)", message):
        expected.insert(0, f"a class path of {subclass[1]}")
    given = re.search(r"Given value: (.*)", message)
    if not expected:
        return ""
    shown = given[1] if given else got
    shown = shown if len(shown) <= _LENGTH else f"{shown[:_LENGTH]} ..."
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {shown.strip() or 'nothing'}"


def _type_name(kind: str) -> str:
    if kind in NAMES:
        return NAMES[kind]
    if kind.startswith("typing.Literal["):
        return f"one of {', '.join(map(str, ast.literal_eval(kind.removeprefix('typing.Literal'))))}"
    if kind.startswith("dot import path"):
        return "a class path"
    return "a file" if kind.startswith("path") else kind


def _of_config(message: str) -> str:
    found = re.search(r"Unable to load config ['\"](.*?)['\"]$", message, re.MULTILINE)
    return f"expected a mapping of options, or a YAML file with one, got {found[1]}" if found else ""
