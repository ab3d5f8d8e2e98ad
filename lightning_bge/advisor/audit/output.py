"""An audit as text for a terminal, and as a section of an HTML page."""

import html
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_bge.advisor.audit.result import Audit, Row
from lightning_bge.advisor.html.page import Raw, Section, code, meter, paragraph, table, write_page

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
    from rich.console import Console  # not for the report, which reads this module as well

    columns = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=io.StringIO(), force_terminal=color, no_color=not color, width=columns, highlight=False)
    for group in dict.fromkeys(row.group for row in audit.rows):
        console.print(_table(group, [row for row in audit.rows if row.group == group]))
    for text in (_step_time(audit), _score_lines(audit), audit.next):
        console.print(text, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(group: str, rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table(title=group, title_justify="left", title_style="bold", pad_edge=False, box=None, padding=(0, 1))
    for name, width in WIDTHS.items():
        table.add_column(name, min_width=min(width, 6), max_width=width, overflow="fold")
    for row in rows:
        saved = "" if row.time_saved is None else _saving(asdict(row.time_saved), digits=0)
        cells = (row.name, row.requested, row.in_effect, saved, row.evidence + f"; {row.fix}" * bool(row.fix))
        name, *others = (cell.replace("[", "\\[") for cell in cells)
        table.add_row(name, f"[{STYLES[row.verdict]}]{LABELS[row.verdict]}[/]", *others)
    return table


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


def _score_lines(audit: Audit) -> str:
    lines = ["\nscore: time with the best known options, divided by the time now"]
    lines += [f"  {score.category:<8} {score.score:>4.0%}  {score.why}" for score in audit.scores]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- HTML

# a sign, a class of the style sheet, and the text
VERDICTS = {
    "ok": ("✓", "good", "ok"),
    "mismatch": ("✗", "bad", "FAIL: requested, but not in effect"),
    "improve": ("○", "", "can be improved"),
    "not applicable": ("-", "muted", "not applicable"),
    "unknown": ("?", "", "not known"),
}
Entry = Mapping[str, Any]


def write_audit_page(path: Path, model: str, audit: Entry) -> Path:
    """Write an audit as a page of its own.

    Args:
        path: the file.
        model: what was audited.
        audit: plain data, as `Audit.as_dict` returns it.

    Returns:
        `path`.
    """
    return write_page(
        path, f"Audit of {model}", [Section("What is in effect, and what would save time", audit_section(audit))]
    )


def audit_section(audit: Entry) -> str:
    """The HTML of an audit: its next step, the scores by category, where a step's time goes, and each optimization.

    Args:
        audit: plain data, as `Audit.as_dict` returns it and `audit.json` holds it.
    """
    parts = [paragraph(audit["next"], "next"), _scores(audit["scorecard"])]
    if audit["step"]["parts"]:
        parts.append(_step(audit["step"], audit["peak"]))
    rows = audit["rows"]
    for group in dict.fromkeys(row["group"] for row in rows):
        parts.append(f"<h3>{html.escape(group.capitalize())}</h3>")
        parts.append(_rows([row for row in rows if row["group"] == group]))
    fixes = [row["fix"] for row in rows if row["verdict"] in ("improve", "mismatch") and row["fix"]]
    lines = dict.fromkeys(fix["yaml"] for fix in fixes if fix["yaml"])
    if lines:
        parts += [paragraph("These options apply the improvements:"), code("\n".join(lines), "switches")]
    machine = table(["property", "value"], [(name, str(value)) for name, value in audit["machine"].items()])
    return "\n".join([*parts, "<h3>Machine</h3>", machine])


def _scores(scores: Sequence[Entry]) -> str:
    text = "A score is the time with the best known options divided by the time now: 100 % if none would save time."
    rows = []
    for one in scores:
        # of a search 100 stands for its training without pruning
        show = _percent if one["category"] == "search" else _ms
        times = show(one["now_ms"]), show(one["best_ms"])
        rows.append((one["category"], meter(one["score"]), *times, one["why"]))
    head = ["category", "score", "time now", "best time", "what would save time"]
    return f"<h3>Scores</h3>{paragraph(text, 'muted')}{table(head, rows, (2, 3))}"


def _step(step: Entry, peak: Entry) -> str:
    total = sum(step["parts"].values()) or 1.0
    ordered = sorted(step["parts"].items(), key=lambda one: -one[1])
    rows = [(name, _ms(ms), meter(ms / total)) for name, ms in ordered]
    text = f"A batch takes {_ms(step['total_ms'])}, from its fetch to the fetch of the next one."
    if peak:
        text += (
            f" Matrix products reach {peak['share']:.0%} of the peak measured in {peak['dtype']}: "
            f"{peak['achieved_gflops']:,.0f} of {peak['peak_gflops']:,.0f} GFLOP/s."
        )
    return f"<h3>Where the time goes</h3>{paragraph(text)}{table(['part', 'time', 'share'], rows, (1,))}"


def _rows(rows: Sequence[Entry]) -> str:
    head = ["optimization", "verdict", "requested", "in effect", "time saved", "evidence, and what to do"]
    cells = []
    for row in rows:
        sign, kind, text = VERDICTS[row["verdict"]]
        name = Raw(f"<b>{html.escape(row['name'])}</b>")
        verdict = Raw(f'<span class="{kind}">{sign} {html.escape(text)}</span>')
        saved = row["time_saved"]
        saving = "" if saved is None else f"{_saving(saved, digits=1)}: {saved['text']}"
        cells.append(
            (name, verdict, row["requested"], row["in_effect"], saving, _evidence(row["evidence"], row["fix"]))
        )
    return table(head, cells)


def _saving(saved: Entry, digits: int) -> str:
    """The share of time that an optimization saves, with its interval, and how that is known."""
    mid, low, high = (f"{saved[name]:.{digits}%}" for name in ("mid", "low", "high"))
    return f"{mid} ({low} to {high}), {saved['kind']}"


def _evidence(evidence: str, fix: Entry | None) -> Raw:
    lines = [html.escape(evidence)]
    if fix is not None:
        effort = f" ({fix['effort']})" * bool(fix["effort"])
        lines.append(f"<b>To do:</b> {html.escape(fix['text'] + effort)}")
        if fix["yaml"]:
            lines.append(f"<code>{html.escape(fix['yaml'])}</code>")
        if fix["accuracy"]:
            lines.append(f"<b>Effect on accuracy:</b> {html.escape(fix['accuracy'])}")
    return Raw(f"<div>{'<br>'.join(filter(None, lines))}</div>" if any(lines) else "")


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _percent(value: float) -> str:
    return f"{value:.0f} %"
