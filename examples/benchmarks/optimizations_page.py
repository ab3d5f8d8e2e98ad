"""The tables of `docs/optimizations.md`, from the records of a CPU and of a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from common import markdown_table
from note import repeat
from optimizations_pruning import PRUNERS

from lightning_bge.runtime.run_folder import write_text

BEGIN, END = "<!-- measured: written by examples/benchmarks/optimizations.py -->", "<!-- end of what was measured -->"
NOT_YET = "not measured yet"
Record = dict[str, Any]
Row = tuple[str, str, str]  # optimization, labels of the two sides, expected gain


def write_page(page: Path, optimizations: Mapping[str, Row], records: Mapping[str, Path]) -> None:
    """Put the tables between the two marks of the page; the text around them is kept.

    Args:
        page: Markdown with both marks.
        optimizations: the rows by their keys in the records.
        records: JSON files by the machine's name; one that is not there is `not measured yet`.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page}: expected one line '{BEGIN}' and one line '{END}'")
    found = {
        machine: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        for machine, path in records.items()
    }
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n{tables(optimizations, found)}\n\n{END}{after}")


def tables(optimizations: Mapping[str, Row], records: Mapping[str, Record | None]) -> str:
    """The tables of optimizer steps and of pruning, and the machines on which they were measured."""
    header = ["optimization", "without / with", "expected"]
    for machine in records:
        header += [f"{machine}: times as fast", "seconds without / with"]
    rows = [
        (*row, *(cell for record in records.values() for cell in _step_cells(record, name)))
        for name, row in optimizations.items()
    ]
    columns = ["pruning", "expected", "study", "whole study", "until within 1 % of the best", "reached"]
    studies = next((record["pruning"] for record in records.values() if record and record["pruning"]), None)
    where = [_describe(machine, record) for machine, record in records.items() if record]
    return "\n\n".join([markdown_table(header, rows), markdown_table(columns, _pruning_rows(studies)), *where])


def _step_cells(record: Record | None, name: str) -> tuple[str, str]:
    if record is not None and name in record["not_measured"]:
        return f"not measured: {record['not_measured'][name]}", ""
    if record is None or name not in record["summary"]:
        return NOT_YET, ""
    found = record["summary"][name]
    ratio = found["times_as_fast"]
    low, high = min(ratio["by_round"]), max(ratio["by_round"])
    return f"**{ratio['of_medians']:.2f}** ({low:.2f} to {high:.2f})", f"{found['without']:.3g} / {found['with']:.3g}"


def _pruning_rows(studies: dict[str, Any] | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, (expected, _) in PRUNERS.items():
        if studies is None:
            rows.append((name, expected, "", NOT_YET, "", ""))
            continue
        for study, values in studies[name].items():
            spans = (_span(values["whole"]), _span(values["to_reach"]), f"{values['reached']:.0%}")
            rows.append((name, expected, study, *spans))
    return rows


def _span(values: list[float]) -> str:
    """The median, and in brackets the range of the middle 80 %."""
    ordered, left_out = sorted(values), len(values) // 10
    return f"**{median(ordered):.2f}** ({ordered[left_out]:.2f} to {ordered[-1 - left_out]:.2f})"


def _describe(machine: str, record: Record) -> str:
    where, versions = record["hardware"], record["versions"]
    units = ", ".join(where["cpu_units"]) or "none of AVX2, AVX512, AMX"
    return (
        f"{machine}: written {record['written']} at commit {record['git_commit'] or 'unknown'}; "
        f"{where['gpu'] or where['cpu']}, {where['cores']} CPU cores ({units}), {where['threads']} threads; python "
        f"{versions['python']}, torch {versions['torch']}, lightning {versions['lightning']}, transformers "
        f"{versions['transformers']}, optuna {versions['optuna']}. {record['rounds']} rounds; precision, except "
        f"where precisions are compared: {record['precision']}.\n\n```bash\n{repeat(record)}\n```"
    )
