from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from lightning_bge.advisor.html.page import Section, code, write_page
from tests.helpers.html_page import page_of
from tests.helpers.made_study import make_study


def test_a_page_loads_nothing_and_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    page = page_of(make_study(tmp_path / "run", 30))
    links = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(str(link).startswith(("#", "data:,")) for link in links)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy)
    assert len(page.scripts) == 2
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in str(policy)
    assert "unsafe-inline" not in str(policy).split("script-src")[1].split(";")[0]


def test_every_colour_of_the_style_sheet_is_a_variable_of_the_theme(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "Title", [Section("One", code("text", "key"))]).read_text()
    style = page.split("<style>")[1].split("</style>")[0]
    defined = style[: style.index("/* ")]
    used = set(re.findall(r"var\((--[a-z]+)\)", style))
    assert len(used) == 8
    for scheme in defined.strip().splitlines():
        assert used == set(re.findall(r"(--[a-z]+):#[0-9a-f]{6};", scheme))
    assert not re.search(r"#[0-9a-f]{3,8}\b", style[len(defined) :])


def test_a_page_without_figures_is_small(tmp_path: Path) -> None:
    assert write_page(tmp_path / "page.html", "Title", [Section("One", "<p></p>")]).stat().st_size < 20_000
