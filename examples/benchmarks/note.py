"""The Markdown note beside a benchmark's JSON: what was compared where, what was found, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown_table

from lightning_bge.runtime.run_folder import write_text


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers with three significant digits."""
    return markdown_table(header, [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in r] for r in rows])


def write_note(out: str, title: str, sections: Sequence[str]) -> Path:
    """Write the note of a record that is there: same folder and stem, ending `.md`.

    Args:
        out: the record, as `write_record` wrote it.
        title: the heading.
        sections: paragraphs and tables; between them stands an empty line.
    """
    record = json.loads(Path(out).read_text(encoding="utf-8"))
    parts = [f"# {title}", _where(record), *sections, f"## How to repeat\n\n```bash\n{repeat(record)}\n```"]
    path = Path(out).with_suffix(".md")
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _where(record: dict[str, Any]) -> str:
    machine = record["hardware"]
    units = ", ".join(machine["cpu_units"]) or "no vector units that matter here"
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items() if found)
    return (
        f"Written {record['written']} from `{record['benchmark']}`'s record (the JSON of the same name beside this "
        f"note), at commit {record['git_commit'] or 'unknown'}.\n\n"
        f"Machine: {machine['cpu']} ({units}), {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']} GiB, GPU: {machine['gpu'] or 'none'}. Model: {record['model']['name']}. "
        f"Versions: {versions}."
    )


def repeat(record: dict[str, Any]) -> str:
    """The command line that a record was made by; where data and other interpreters lie is left open."""
    threads = record["hardware"]["threads"]
    words = [
        f"OMP_NUM_THREADS={threads}",
        "python",
        f"examples/benchmarks/{record['benchmark']}.py",
        "--data",
        "FOLDER",
    ]
    for name, value in record["options"].items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *(f"'{item}'" if " " in str(item) else str(item) for item in value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    if "FlagEmbedding" in (record["options"].get("contenders") or ()):
        words += ["--flagembedding", "PYTHON"]
    return " ".join(words)
