"""An audit as text for a terminal."""

from __future__ import annotations

import io
import shutil

from rich.console import Console
from rich.table import Table

from lightning_bge.advisor.audit.audit import Audit
from lightning_bge.advisor.audit.checks.row import Row, TimeSaved

LABELS = {"ok": "ok", "mismatch": "FAIL", "improve": "improve", "not applicable": "-", "unknown": "?"}
STYLES = {"ok": "green", "mismatch": "bold red", "improve": "yellow", "not applicable": "dim", "unknown": "yellow"}
# columns of the table -> the most characters; the last one takes what is left
WIDTHS = {"optimization": 22, "": 7, "requested": 12, "in effect": 18, "time saved": 20, "evidence; what to do": 200}


def describe_audit(audit: Audit, color: bool = False, width: int | None = None) -> str:
    """The audit as text: a table of all rows, where the time goes, the scores, and what to do next.

    Args:
        audit: the result of an audit.
        color: use a terminal's colors; they carry no meaning of their own.
        width: columns; None: the terminal's.
    """
    columns = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=io.StringIO(), force_terminal=color, no_color=not color, width=columns, highlight=False)
    for group in dict.fromkeys(row.group for row in audit.rows):
        console.print(_table(group, [row for row in audit.rows if row.group == group]))
    for text in (_step_time(audit), _scores(audit), audit.next):
        console.print(text, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(group: str, rows: list[Row]) -> Table:
    table = Table(title=group, title_justify="left", title_style="bold", pad_edge=False, box=None, padding=(0, 1))
    for name, width in WIDTHS.items():
        table.add_column(name, min_width=min(width, 6), max_width=width, overflow="fold")
    for row in rows:
        text = row.evidence
        if row.fix is not None:
            text += f"; {row.fix.text}" + f" ({row.fix.yaml})" * bool(row.fix.yaml)
        cells = (row.name, row.requested, row.in_effect, format_saving(row.time_saved), text)
        name, *others = (cell.replace("[", "\\[") for cell in cells)
        table.add_row(name, f"[{STYLES[row.verdict]}]{LABELS[row.verdict]}[/]", *others)
    return table


def format_saving(saved: TimeSaved | None) -> str:
    """A share of time with its interval; empty: it is not known."""
    if saved is None:
        return ""
    interval = "" if saved.low == saved.high else f" ({saved.low:.0%} to {saved.high:.0%})"
    return f"{saved.mid:.0%}{interval}, {saved.kind}"


def _step_time(audit: Audit) -> str:
    if not audit.parts:
        return ""
    ordered = sorted(audit.parts.items(), key=lambda one: -one[1])
    parts = ", ".join(f"{part} {ms:.0f}" for part, ms in ordered if ms >= 0.5)
    text = f"\ntime of a batch: {audit.step_ms:.0f} ms ({parts})"
    if audit.peak:
        peak = audit.peak
        text += f"\nmatrix products: {peak['achieved_gflops']:.0f} of the {peak['peak_gflops']:.0f} GFLOP/s that this "
        text += f"machine reaches in {peak['dtype']} ({peak['share']:.0%}), over the whole step"
    return text


def _scores(audit: Audit) -> str:
    lines = ["\nscore: time with the best known options, divided by the time now"]
    lines += [f"  {score.category:<8} {score.score:>4.0%}  {score.why}" for score in audit.scores]
    return "\n".join(lines) + "\n"
