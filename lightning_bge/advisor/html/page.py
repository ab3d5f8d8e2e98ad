"""A self-contained HTML page: style, script, figures and their data in one file, which needs no network.

All functions escape the plain text that they get. Only `Section.html`, `Raw` and their own results are HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bge.advisor.html.theme import DARK, css_variables
from lightning_bge.runtime.run_folder import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: plain text.
        html: its content, as HTML.
    """

    title: str
    html: str

    @property
    def id(self) -> str:
        """The id of its element, which links within the page use."""
        return f"section-{re.sub(r'[^a-z0-9]+', '-', self.title.lower()).strip('-')}"


def write_page(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """Write a page.

    Args:
        path: the file; it is replaced in one step.
        title: plain text.
        sections: in their order.
        lead: HTML below the title.

    Returns:
        `path`.
    """
    body = "\n".join(
        f'<section id="{one.id}"><h2>{html.escape(one.title)}</h2>\n{one.html}\n</section>' for one in sections
    )
    links = "".join(f'<a href="#{one.id}">{html.escape(one.title)}</a>' for one in sections)
    scripts = [_asset("page.js")]
    if '<div class="plot"' in body:
        from plotly.offline import get_plotlyjs

        scripts.insert(0, get_plotlyjs().replace("\r\n", "\n"))
    written = datetime.now().strftime("%Y-%m-%d %H:%M")
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{css_variables()}{_asset("page.css")}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1>
{lead}
<nav aria-label="Sections">{links}</nav></header>
<main>
{body}
</main>
<footer>Written on {written} by lightning-bge. It contains no texts of your data.
<noscript>The figures need JavaScript; everything else is shown without it.</noscript></footer>
<script type="application/json" id="dark-colors">{json.dumps(DARK)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""
    write_text(path, text)
    return path


def _asset(name: str) -> str:
    return (files("lightning_bge.advisor.html") / "assets" / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy that allows these scripts alone, and loads nothing."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # plotly sets the style of its elements
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


# ---------------------------------------------------------------------- the content of sections


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """The main figures of a section, each with its meaning."""
    found = (
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
        for value, what in figures
    )
    return f'<div class="cards">{"".join(found)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table. Rows of more than three cells become blocks on a narrow screen.

    Args:
        head: names of the columns.
        rows: cells, as plain text or `Raw`.
        numbers: indices of the columns that hold numbers.
    """
    right = set(numbers)
    kind = [' class="number"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{kind[i]}>{html.escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{kind[i]} data-label="{html.escape(head[i])}">{cell if isinstance(cell, Raw) else _cell(cell)}</td>'
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    stack = ' class="stack"' if len(head) > 3 else ""
    return f"<table{stack}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


class Raw(str):
    """Text that is HTML already."""


def _cell(text: str) -> str:
    return f"<span>{html.escape(text)}</span>" if text else ""


def meter(share: float) -> Raw:
    """A share from 0 to 1 as a percentage and a bar."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Raw(f'<span>{share:.0%}<span class="meter"><i style="width:{width:.1f}%"></i></span></span>')


def code(text: str, key: str) -> str:
    """Text with a button that copies it.

    Args:
        text: plain text.
        key: the id of its element, unique in the page.
    """
    return (
        f'<div class="copied"><button type="button" hidden data-copies="{key}">Copy</button>'
        f'<pre id="{key}" tabindex="0">{html.escape(text)}</pre></div>'
    )


def plot(fig: go.Figure, key: str, caption: str) -> str:
    """A figure with its caption.

    Args:
        fig: the figure, in the light colours of `theme`.
        key: the id of its element, unique in the page.
        caption: plain text; screen readers read it in place of the figure.
    """
    # escaped, so that no text in the data ends the script element
    data = fig.to_json().replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    caption = html.escape(caption)
    return (
        f'<figure><div class="plot" id="{key}" role="img" aria-label="{caption}" '
        f'style="height:{fig.layout.height}px"></div>'
        f'<script type="application/json" id="{key}-data">{data}</script><figcaption>{caption}</figcaption></figure>'
    )
