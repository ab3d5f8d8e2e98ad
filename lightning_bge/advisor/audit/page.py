"""An audit as a section of a page: what is claimed, what is in effect, and what is still to be gained."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bge.advisor.html.page import Raw, Section, code, meter, paragraph, table, write_page

if TYPE_CHECKING:
    from lightning_bge.advisor.audit.audit import Audit

# a sign, a class of the style sheet, and words
VERDICTS = {
    "ok": ("✓", "good", "fine"),
    "lie": ("✗", "bad", "claimed, but not in effect"),
    "off": ("○", "", "off"),
    "not applicable": ("-", "muted", "not applicable"),
    "unknown": ("?", "", "not known"),
}
Entry = Mapping[str, Any]


def write_audit_page(path: Path, model: str, audit: Audit) -> Path:
    """Write an audit as a page of its own.

    Args:
        path: the file.
        model: what was audited.
        audit: what was found.

    Returns:
        `path`.
    """
    return write_page(path, f"Audit of {model}", [Section("Are we maxed out?", audit_section(audit.as_dict()))])


def audit_section(audit: Mapping[str, Any]) -> str:
    """The HTML of an audit: its next step, the scores by category, where a step's time goes, and each optimisation.

    Args:
        audit: what `lightning-bge audit` has written. What is not in it is left out.
    """
    parts = []
    if audit.get("next"):
        parts.append(paragraph(str(audit["next"]), "next"))
    if audit.get("scorecard"):
        parts.append(_scores(audit["scorecard"]))
    if (audit.get("step") or {}).get("parts"):
        parts.append(_step(audit["step"], audit.get("peak") or {}))
    rows: Sequence[Entry] = audit.get("rows") or ()
    for group in dict.fromkeys(str(row.get("group", "other")) for row in rows):
        parts.append(f"<h3>{html.escape(group.capitalize())}</h3>")
        parts.append(_rows([row for row in rows if str(row.get("group", "other")) == group]))
    lines = [str(row["yaml"]).rstrip() for row in rows if row.get("yaml") and row.get("verdict") in ("off", "lie")]
    if lines:
        parts.append(paragraph("These settings switch on what is off:"))
        parts.append(code("\n".join(dict.fromkeys(lines)), "switches"))
    if audit.get("machine"):
        parts.append("<h3>Machine</h3>")
        parts.append(table(["what", "value"], [(name, said(value)) for name, value in audit["machine"].items()]))
    return "\n".join(parts) or paragraph("The audit holds nothing that this version can show.")


def _scores(scores: Sequence[Entry]) -> str:
    text = "A score is the time at the best setting known over the time now: at 100 % nothing is left to be gained."
    rows = []
    for one in scores:
        # of a search 100 stands for all its training without pruning
        show = _percent if one.get("category") == "search" else _ms
        score = one.get("score")
        rows.append(
            (
                said(one.get("category")),
                "not known" if score is None else meter(float(score)),
                show(one.get("now_ms")),
                show(one.get("best_ms")),
                said(one.get("why")),
            )
        )
    head = ["category", "score", "now", "at best", "what is left"]
    return f"<h3>Scores</h3>{paragraph(text, 'muted')}{table(head, rows, (2, 3))}"


def _step(step: Entry, peak: Entry) -> str:
    parts: Mapping[str, float] = step["parts"]
    total = sum(parts.values()) or 1.0
    ordered = sorted(parts.items(), key=lambda one: -one[1])
    rows = [(name, _ms(ms), meter(ms / total)) for name, ms in ordered]
    text = f"From one batch to the next it takes {_ms(step.get('total_ms', total))}."
    if peak.get("share") is not None:
        text += (
            f" Matrix products reach {peak['share']:.0%} of what was measured as the most in {peak.get('dtype', '?')}"
        )
        if peak.get("achieved_gflops") is not None and peak.get("peak_gflops") is not None:
            text += f": {peak['achieved_gflops']:,.0f} of {peak['peak_gflops']:,.0f} GFLOP/s"
        text += "."
    return f"<h3>Where the time goes</h3>{paragraph(text)}{table(['part', 'time', 'share'], rows, (1,))}"


def _rows(rows: Sequence[Entry]) -> str:
    head = ["what", "verdict", "claimed", "in effect", "gain", "why, and what to do"]
    return table(
        head,
        [
            (
                Raw(f"<b>{html.escape(said(row.get('name')))}</b>"),
                _verdict(said(row.get("verdict")) or "unknown"),
                said(row.get("claimed")),
                said(row.get("in_effect")),
                gain_text(row.get("gain")),
                _advice(row),
            )
            for row in rows
        ],
    )


def _verdict(verdict: str) -> Raw:
    sign, kind, words = VERDICTS.get(verdict, ("?", "", verdict))
    return Raw(f'<span class="{kind}">{sign} {html.escape(words)}</span>')


def gain_text(gain: Entry | None) -> str:
    """What an optimisation brings, with its interval, and how that is known."""
    if not gain:
        return ""
    found = ""
    if gain.get("mid") is not None:
        found = f"{gain['mid']:.1%}"
        if gain.get("low") is not None and gain.get("high") is not None:
            found += f" ({gain['low']:.1%} to {gain['high']:.1%})"
        found += f", {gain['kind']}" if gain.get("kind") else ""
    return ": ".join(part for part in (found, said(gain.get("text"))) if part)


def _advice(row: Entry) -> Raw:
    lines = [html.escape(said(row["evidence"]))] if row.get("evidence") else []
    if row.get("advice"):
        effort = f" ({row['effort']})" if row.get("effort") else ""
        lines.append(f"<b>To do:</b> {html.escape(said(row['advice']) + effort)}")
    if row.get("yaml"):
        lines.append(f"<code>{html.escape(said(row['yaml']))}</code>")
    if row.get("accuracy"):
        lines.append(f"<b>Accuracy:</b> {html.escape(said(row['accuracy']))}")
    return Raw(f"<div>{'<br>'.join(lines)}</div>" if lines else "")


def said(value: Any) -> str:
    """A value in words; empty: there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"
