"""Reads an HTML page, and the report of a run folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lightning_bge.advisor.report.report import write_report


class Page(HTMLParser):
    """A page as its reader has it: elements, text, scripts, and the data of its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.words.append(data)
        elif self._inside[1].get("type") == "application/json":
            self.data[str(self._inside[1]["id"])] = json.loads(data)
        elif self._inside[0] == "script":
            self.scripts.append(data)

    @property
    def shown(self) -> str:
        """The text that a reader sees."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def figures(self) -> list[str]:
        """The ids of the figures."""
        return [str(attributes["id"]) for _, attributes in self.elements if attributes.get("class") == "plot"]

    def traces(self, figure: str) -> dict[str, Any]:
        """The traces of a figure by name."""
        return {trace.get("name"): trace for trace in self.data[f"{figure}-data"]["data"]}


def page_of(run_dir: Path) -> Page:
    """Write the report of a run folder, and read it."""
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page
