"""Lists the lines of the package that run on a CUDA device alone, and a test on the simulated device that runs each.

    pip install coverage
    python tests/tools/cuda_lines.py          # writes docs/benchmarks/cuda_lines.md; several minutes

A line counts where it is in the branch of a condition on CUDA that a CUDA device takes, calls a function of
`torch.cuda`, or is in a module of kernels. It is run if a test on the simulated device (tests/simulated_cuda) runs it
and the test passes: there its tensors say that they are on a GPU, and have values. A line that runs only where the
function itself is replaced does not count as run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_bge"
OUT = ROOT / "docs" / "benchmarks" / "cuda_lines.md"
KERNELS = ("models/attention/cuda.py",)  # each function is for a GPU
CONDITION = re.compile(r"['\"]cuda['\"]|torch\.cuda\.|is_cuda|on_gpu|nvidia")
CALL = re.compile(r"torch\.cuda\.\w+\(|torch\._C\._cuda\w+\(")
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def cuda_lines(source: str, kernels: bool = False) -> dict[int, str]:
    """The lines of a module that run on a CUDA device alone, and the function of each."""
    return {statement.lineno: function for function, statement in _statements(ast.parse(source).body, "", kernels)}


def _statements(body: list[ast.stmt], function: str, inside: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Single statements that count, each with the name of its function; `inside`: all of them do."""
    for number, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            within = node.body if isinstance(node, ast.FunctionDef) else methods
            yield from _statements(within, f"{function}.{node.name}".strip("."), inside)
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and CONDITION.search(ast.unparse(node.test)):
            taken, other = (node.orelse, node.body) if _is_negative(node.test) else (node.body, node.orelse)
            yield from _statements(taken, function, inside=True)
            yield from _statements(other, function, inside=False)
            if _is_negative(node.test) and isinstance(node.body[-1], ENDS) and not node.orelse:
                yield from _statements(body[number + 1 :], function, inside=True)
                return
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if any(blocks):
            for block in blocks:
                yield from _statements(block, function, inside)
        elif function and (inside or CALL.search(ast.unparse(node)) or _chooses(node)):
            yield function, node


def _is_negative(test: ast.expr) -> bool:
    """Whether a condition holds where there is no CUDA device."""
    text = ast.unparse(test)
    return bool(re.search(r"!= ['\"]cuda|not torch\.cuda\.", text)) or text.startswith("not ")


def _chooses(node: ast.stmt) -> bool:
    """Whether a value depends on CUDA."""
    return any(isinstance(one, ast.IfExp) and CONDITION.search(ast.unparse(one.test)) for one in ast.walk(node))


# Why no test can run a line, by the function that it is in.
_TRACED = (
    "torch's profiler does not end over the simulated tensors; advisor/audit/test_checks_compute_precision.py: figures"
)
_COMPILED = "torch.compile does not take the simulated tensors; models/attention/test_cuda.py: fake CUDA tensors"
REASONS: dict[str, str] = {
    "advisor/audit/checks_compute.py:tf32": _TRACED,
    "advisor/audit/observe.py:Recorder.__init__": _TRACED,
    "callbacks/compile/probe.py:measure": _COMPILED,
    "hpo/trial/ranks.py:RankGroup._connect": "NCCL needs a GPU for each process; gloo takes its place in hpo/trial",
    "models/attention/cuda.py:_": _COMPILED,
}


def run_tests(folder: Path) -> Path:
    """Run the tests on the simulated device; the file with what each has run."""
    settings = folder / "coveragerc"
    settings.write_text(f"[run]\nsource = {PACKAGE}\ndynamic_context = test_function\ndata_file = {folder / 'data'}\n")
    sys.path.insert(0, str(ROOT))
    from tests.test_simulated_cuda import COMPILED, FOR_A_GPU

    own = [(str(path),) for path in sorted((ROOT / "tests" / "simulated_cuda").glob("test_*.py"))]
    others = [("-m", "gpu", "-k", f"not ({COMPILED})", str(ROOT / "tests" / name)) for name in FOR_A_GPU]
    command = [sys.executable, "-m", "coverage", "run", "--append", f"--rcfile={settings}", "-m", "pytest", "-q"]
    for arguments in [*own, *others]:
        plugins = ("-p", "tests.simulated_cuda.plugin", "-p", "no:cacheprovider")
        subprocess.run([*command, *plugins, *arguments], cwd=ROOT, check=True)
    return folder / "data"


def main() -> None:
    """Run, and write the list."""
    from coverage import CoverageData

    rows, run, total = [], 0, 0
    with tempfile.TemporaryDirectory() as name:
        data = CoverageData(str(run_tests(Path(name))))
        data.read()
        for path in sorted(PACKAGE.rglob("*.py")):
            place = path.relative_to(PACKAGE).as_posix()
            contexts = data.contexts_by_lineno(str(path))
            source = path.read_text(encoding="utf-8")
            for line, function in sorted(cuda_lines(source, place in KERNELS).items()):
                tests = sorted(filter(None, contexts.get(line, [])))
                shown = tests[0].removeprefix("tests.") if tests else REASONS.get(f"{place}:{function}", "not run")
                rows.append(f"| {place}:{line} | `{function}` | {shown} |")
                run, total = run + bool(tests), total + 1
    title = "# Lines that run on a CUDA device alone\n\n"
    text = f"{run} of {total} lines are run by tests on the simulated device. `tests/tools/cuda_lines.py`.\n\n"
    head = "| line | function | a test that runs it, or why none does |\n| --- | --- | --- |\n"
    OUT.write_text(title + text + head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{run} of {total} lines")


if __name__ == "__main__":
    main()
