from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.advisor.audit.page import audit_section
from lightning_bge.advisor.html.page import Section, write_page
from tests.helpers.audit_sample import AUDIT
from tests.helpers.html_page import Page


def test_an_audit_is_shown_with_its_verdicts_gains_and_switches(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "audit.html", "Audit", [Section("Scorecard", audit_section(AUDIT))]))
    for words in (
        AUDIT["next"],
        "✗ claimed, but not in effect",
        "✓ fine",
        "○ off",
        "- not applicable",
        "? not known",
        "38.0% (31.0% to 44.0%), measured: bf16 autocast against fp32, 5 rounds",
        "148 ms",
        "96 of 185 GFLOP/s",
        "trainer.precision: bf16-mixed\ndata.batching.num_workers: 0",
    ):
        assert re.sub(r"\s+", " ", words) in page.shown
    assert page.shown.count("Next:") == 1
    assert "62%" in page.shown
    assert ("i", {"style": "width:62.0%"}) in page.elements


@pytest.mark.parametrize(
    "audit", [{}, {"rows": [{}]}, {"scorecard": [{}]}, {"step": {"parts": {}}}, {"peak": None, "rows": None}]
)
def test_an_audit_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path, audit: dict[str, Any]) -> None:
    Page(write_page(tmp_path / "audit.html", "Audit", [Section("Scorecard", audit_section(audit))]))
