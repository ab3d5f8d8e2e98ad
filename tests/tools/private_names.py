"""Finds private names of foreign libraries that are used outside `lightning_bge/runtime/compat`.

python tests/tools/private_names.py

Found are: imports of underscore modules and names; attributes with a leading underscore that neither the module nor the
class (with its bases in this package) defines; the same by `getattr`, `setattr`, `hasattr`, `delattr`; modules with an
underscore in strings, as `sys.modules` and `importlib` take them; assignments to what another library gave.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "lightning_bge"
COMPAT = ("runtime", "compat")
# documented as public in spite of the underscore
NAMEDTUPLE = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
LIBRARIES = "torch|lightning|lightning_fabric|pytorch_lightning|optuna|optuna_integration|transformers|peft"
MODULE_STRING = re.compile(rf"({LIBRARIES})(\.\w+)*\._\w+(\.\w+)*")


def is_private(name: str) -> bool:
    """`_name`, but neither `__name__` nor `_`."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_ours(module: str) -> bool:
    """Whether a module is part of this package."""
    return module.split(".")[0] == PACKAGE


class Classes:
    """The classes of the package, and which private names each defines itself or through bases in the package."""

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self.names: dict[str, set[str]] = {}
        self.bases: dict[str, list[str]] = {}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.names.setdefault(node.name, set()).update(_defined(node))
                    self.bases.setdefault(node.name, []).extend(_last(base) for base in node.bases)

    def private_names(self, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Private names of a class of this package; none for a foreign one."""
        if name in seen or name not in self.names:
            return set()
        inherited = (self.private_names(base, seen | {name}) for base in self.bases[name])
        return self.names[name].union(*inherited)


def _last(node: ast.expr) -> str:
    """`a.b.C[int]` -> `C`."""
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _defined(tree: ast.AST) -> set[str]:
    """Private names that are assigned, annotated or defined in a class or a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
                found |= {each.value for each in ast.walk(value) if isinstance(each, ast.Constant)}
    return {name for name in found if isinstance(name, str) and is_private(name)}


def problems(tree: ast.Module, classes: Classes) -> Iterator[tuple[int, str]]:
    """Line and description of each use of a foreign library's private name in a module."""
    own, foreign = _defined(tree), _foreign_imports(tree)
    for node, inside in _walk(tree, None):
        match node:
            case ast.Import(names=names):
                for name in names:
                    if not is_ours(name.name) and any(is_private(part) for part in name.name.split(".")):
                        yield node.lineno, f"import of {name.name}"
            case ast.ImportFrom(module=str(module), names=names) if not is_ours(module) and module != "__future__":
                for name in names:
                    if any(is_private(part) for part in [*module.split("."), name.name]):
                        yield node.lineno, f"import of {module}.{name.name}"
            case ast.Attribute(value=value, attr=name) if is_private(name) and name not in NAMEDTUPLE:
                of_self = isinstance(value, ast.Name) and value.id in ("self", "cls")
                of_super = isinstance(value, ast.Call) and _last(value.func) == "super"
                known = classes.private_names(inside or "") if of_self or of_super else own
                if of_super:
                    known = known - classes.names.get(inside or "", set())
                if name not in known:
                    yield node.lineno, f"attribute {ast.unparse(node)}"
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]) if (
                function in BY_NAME and is_private(name)
            ):
                yield node.lineno, f"{function} of {name}"
            case ast.Constant(value=str(text)) if MODULE_STRING.fullmatch(text):
                yield node.lineno, f"module {text} by its name"
            case ast.Assign(targets=targets):
                for target in targets:
                    public = ast.unparse(target).startswith("torch.backends.")  # its flags are set by assignment
                    if isinstance(target, ast.Attribute) and _root(target) in foreign and not public:
                        yield node.lineno, f"assignment to {ast.unparse(target)}"


def _walk(node: ast.AST, inside: str | None) -> Iterator[tuple[ast.AST, str | None]]:
    """All nodes, each with the class that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from _walk(child, child.name if isinstance(child, ast.ClassDef) else inside)


def _root(node: ast.expr) -> str:
    return _root(node.value) if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _foreign_imports(tree: ast.Module) -> set[str]:
    """The names under which modules, classes and functions of other libraries are known in a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(name.asname or name.name).split(".")[0] for name in node.names if not is_ours(name.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and not is_ours(node.module):
            found |= {name.asname or name.name for name in node.names}
    return found


def check(root: Path) -> list[str]:
    """`path:line: what` for each problem below a folder that holds the package."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    classes = Classes(trees)
    return [
        f"{path.relative_to(root)}:{line}: {what}"
        for path, tree in trees.items()
        if path.relative_to(root / PACKAGE).parts[:2] != COMPAT
        for line, what in problems(tree, classes)
    ]


def main() -> None:
    """Print all problems; exit with status 1 where there are any."""
    found = check(Path(__file__).parents[2])
    for line in found:
        print(line)
    if found:
        print(
            "A private name of another library belongs into lightning_bge/runtime/compat, with its reason and a test."
        )
        sys.exit(1)
    print("no private name of another library outside lightning_bge/runtime/compat")


if __name__ == "__main__":
    main()
