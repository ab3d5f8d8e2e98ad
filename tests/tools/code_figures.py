"""The size of the code: modules per folder, lines, long functions, wide constructors, public names.

python tests/tools/code_figures.py

Limits: 14 modules in a folder, 400 lines in a module, 60 lines in a function, 10 arguments of a constructor (of a
dataclass: fields).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lightning_bge"
MODULES, LINES, FUNCTION, ARGUMENTS = 14, 400, 60, 10


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and name of each function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, node.name


def constructors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Number of arguments and name of each class that has a constructor, dataclasses and named tuples included."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if any("dataclass" in ast.unparse(each) for each in node.decorator_list) or "NamedTuple" in map(
            ast.unparse, node.bases
        ):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            yield sum("init=False" not in ast.unparse(each) for each in fields), node.name
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                yield len(each.args.args) + len(each.args.kwonlyargs) - 1, node.name


def public_names(folder: Path) -> int:
    """Names that a package's stub exports."""
    stub = folder / "__init__.pyi"
    if not stub.is_file():
        return 0
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    return sum(len(node.names) for node in tree.body if isinstance(node, ast.ImportFrom))


def main() -> None:
    """Print all figures, and what is over a limit."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in trees}
    over: list[str] = []

    print(f"{sum(lines.values()):,} lines in {len(trees)} modules\n\nmodules and lines of each folder")
    folders = Counter(path.parent for path in trees if path.name != "__init__.py")
    for folder, count in sorted(folders.items()):
        own = sum(lines[path] for path in trees if path.parent == folder)
        print(f"  {folder.relative_to(PACKAGE.parent)!s:<44}{count:>4}{own:>8,}")
        over += [f"{folder.relative_to(PACKAGE.parent)}: {count} modules"] if count > MODULES else []

    print("\nlongest modules")
    for path, count in sorted(lines.items(), key=lambda item: -item[1])[:12]:
        print(f"  {count:>4}  {path.relative_to(PACKAGE.parent)}")
    over += [f"{path.relative_to(PACKAGE.parent)}: {count} lines" for path, count in lines.items() if count > LINES]

    for title, find, limit, unit in (
        ("longest functions", functions, FUNCTION, "lines"),
        ("constructors with the most arguments", constructors, ARGUMENTS, "arguments"),
    ):
        print(f"\n{title}")
        found = sorted(
            (
                (count, f"{path.relative_to(PACKAGE.parent)}:{name}")
                for path, tree in trees.items()
                for count, name in find(tree)
            ),
            reverse=True,
        )
        for count, name in found[:12]:
            print(f"  {count:>4}  {name}")
        over += [f"{name}: {count} {unit}" for count, name in found if count > limit]

    print("\npublic names")
    for folder in [PACKAGE, *sorted(path for path in PACKAGE.iterdir() if path.is_dir())]:
        if count := public_names(folder):
            print(f"  {count:>4}  {folder.relative_to(PACKAGE.parent)}")

    print(f"\nover a limit: {len(over)}")
    for each in over:
        print(f"  {each}")


if __name__ == "__main__":
    main()
