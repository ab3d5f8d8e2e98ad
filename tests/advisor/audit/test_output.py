"""An audit as a section of an HTML page."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_bge.advisor.audit.output import audit_section
from lightning_bge.advisor.html.page import Section, write_page
from tests.helpers.audit_sample import AUDIT
from tests.helpers.html_page import Page


def test_a_page_shows_verdicts_savings_and_options(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "audit.html", "Audit", [Section("Scorecard", audit_section(AUDIT))]))
    for text in (
        AUDIT["next"],
        "✗ FAIL: requested, but not in effect",
        "✓ ok",
        "○ can be improved",
        "- not applicable",
        "? not known",
        "38.0% (31.0% to 44.0%), measured: bf16 autocast against fp32, 5 rounds",
        "148 ms",
        "96 of 185 GFLOP/s",
        "trainer.precision: bf16-mixed\ndata.batching.num_workers: 0",
    ):
        assert re.sub(r"\s+", " ", text) in page.shown
    assert page.shown.count("Next:") == 1
    assert "62%" in page.shown
    assert ("i", {"style": "width:62.0%"}) in page.elements
