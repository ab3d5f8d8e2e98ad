"""An audit for a terminal."""

from __future__ import annotations

import io
import shutil

from rich.console import Console
from rich.table import Table

from lightning_bge.advisor.audit.audit import Audit
from lightning_bge.advisor.audit.checks_compute import Gain, Row

SIGNS = {"ok": "ok", "lie": "NOT SO", "off": "off", "not applicable": "-", "unknown": "?"}
STYLES = {"ok": "green", "lie": "bold red", "off": "yellow", "not applicable": "dim", "unknown": "yellow"}
# columns of the table -> characters at the most; the last one takes what is left
WIDTHS = {"what": 22, "": 6, "claimed": 12, "in effect": 18, "brings": 20, "evidence; what to do": 200}


def describe_audit(audit: Audit, color: bool = False, width: int | None = None) -> str:
    """The audit as text: a table of all rows, where the time goes, the scores, and what to do next.

    Args:
        audit: what was found.
        color: with a terminal's colours; no meaning is carried by them alone.
        width: columns; None: the terminal's.
    """
    columns = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=io.StringIO(), force_terminal=color, no_color=not color, width=columns, highlight=False)
    for group in dict.fromkeys(row.group for row in audit.rows):
        console.print(_table(group, [row for row in audit.rows if row.group == group]))
    console.print(_time(audit))
    console.print(_scores(audit))
    console.print(audit.next, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(group: str, rows: list[Row]) -> Table:
    table = Table(title=group, title_justify="left", title_style="bold", pad_edge=False, box=None, padding=(0, 1))
    for name, width in WIDTHS.items():
        table.add_column(name, min_width=min(width, 6), max_width=width, overflow="fold")
    for row in rows:
        advice = f"; {row.advice}" * bool(row.advice) + f" ({row.yaml})" * bool(row.yaml)
        sign = f"[{STYLES[row.verdict]}]{SIGNS[row.verdict]}[/]"
        cells = (row.name, row.claimed, row.in_effect, words_of(row.gain), row.evidence + advice)
        name, claimed, in_effect, gain, evidence = (cell.replace("[", "\\[") for cell in cells)
        table.add_row(name, sign, claimed, in_effect, gain, evidence)
    return table


def words_of(gain: Gain | None) -> str:
    """A gain with its interval."""
    if gain is None:
        return ""
    if gain.low == gain.high:
        return f"{gain.mid:.0%}, {gain.kind}"
    return f"{gain.mid:.0%} ({gain.low:.0%} to {gain.high:.0%}), {gain.kind}"


def _time(audit: Audit) -> str:
    if not audit.parts:
        return ""
    parts = ", ".join(
        f"{part} {ms:.0f}" for part, ms in sorted(audit.parts.items(), key=lambda one: -one[1]) if ms >= 0.5
    )
    text = f"\nfrom one batch to the next {audit.step_ms:.0f} ms: {parts}"
    if audit.peak:
        peak = audit.peak
        text += f"\nmatrix products: {peak['achieved_gflops']:.0f} of the {peak['peak_gflops']:.0f} GFLOP/s that this "
        text += f"machine reaches in {peak['dtype']} ({peak['share']:.0%}), over the whole step"
    return text


def _scores(audit: Audit) -> str:
    lines = ["\nscore: time at the best setting known over the time now"]
    lines += [f"  {score.category:<8} {score.score:>4.0%}  {score.why}" for score in audit.scores]
    return "\n".join(lines) + "\n"
