"""What a phone and a printer show of the page."""

from __future__ import annotations

import re

from grappa_dist.report.content import ReportContent, ScoreRow
from grappa_dist.report.html import STYLE
from grappa_dist.report.page import page


def rule(selector: str, style: str = STYLE) -> str:
    found = re.search(rf"(?:^|[}}{{]){re.escape(selector)}\{{([^}}]*)\}}", style)
    assert found is not None, selector
    return found[1]


def test_a_table_that_is_wider_than_the_screen_scrolls_with_a_shadow_at_the_edge_that_hides_more() -> None:
    rows = [
        ScoreRow(model=model, task=f"task {i}", queries=9, r_precision=0.5, map_at_r=0.4, recall_at_1=0.6)
        for model in ("backbone", "average")
        for i in range(9)
    ]
    html = page(ReportContent(title="t", rows=rows))
    tables = re.findall(r"(.{20})<table", html)
    assert tables
    assert all(before.endswith('<div class="scroll">') for before in tables)
    assert "background-attachment:local,local,scroll,scroll" in rule(".scroll")
    assert STYLE.count("--edge:") == 2  # light and dark


def test_paper_shows_whole_tables_and_a_phone_all_links() -> None:
    printed, phone = STYLE.partition("@media print{")[2], STYLE.partition("@media(max-width:640px){")[2]
    assert "overflow:visible" in rule(".scroll", printed)
    assert "flex-wrap:wrap" in rule("nav", phone)
