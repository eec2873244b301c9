"""The part of the page on partitions: nestedness and sample clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grappa_dist.report import ClusterSample, ContactSheet, Gallery, Hit, Nesting, ReportContent, write_report

PICKS: tuple[Literal["largest", "median", "drawn"], ...] = ("largest", "median", "drawn")
JPEG = b"\xff\xd8\xff"


def nesting(coarse: int, fine: int, *, rows: int = 90, of: int = 90) -> Nesting:
    return Nesting(coarse=coarse, fine=fine, nestedness=0.8, chance=0.2, rows=rows, of=of)


def sheet(k: int, images: int = 6) -> ContactSheet:
    picks = [
        ClusterSample(pick=pick, label=label, size=9, images=[JPEG + bytes([k, label, i]) for i in range(images)])
        for label, pick in enumerate(PICKS)
    ]
    return ContactSheet(k=k, clusters=picks)


def render(out: Path, content: ReportContent) -> str:
    write_report(content, out)
    return (out / "report.html").read_text(encoding="utf-8")


def test_nestedness_is_shown_with_chance_and_adjusted_for_it(tmp_path: Path) -> None:
    html = render(tmp_path, ReportContent(title="t", nestings=[nesting(16, 64), nesting(4, 16)]))
    assert html.index("k=16 in k=4<") < html.index("k=64 in k=16<")
    row = html[html.index("k=16 in k=4<") : html.index("k=64 in k=16<")]
    assert [word in row for word in ("80.0 %", "20.0 %", "0.750")] == [True] * 3
    assert "on all 90 images" in html
    assert "random sample" not in html


def test_a_sample_of_rows_is_stated(tmp_path: Path) -> None:
    html = render(tmp_path, ReportContent(title="t", nestings=[nesting(4, 16, rows=1_000_000, of=2_500_000)]))
    assert "random sample of 1,000,000 of 2,500,000 images" in html


def test_where_chance_nests_perfectly_the_adjusted_nestedness_is_a_dash(tmp_path: Path) -> None:
    one = Nesting(coarse=1, fine=2, nestedness=1.0, chance=1.0, rows=3, of=3)
    html = render(tmp_path, ReportContent(title="t", nestings=[one]))
    assert "<td>–</td>" in html


def test_one_partition_has_a_contact_sheet_and_no_table_of_nestedness(tmp_path: Path) -> None:
    html = render(tmp_path, ReportContent(title="t", sheets=[sheet(5)]))
    assert "nested" not in html
    assert "3 of 5 clusters" in html
    assert "9 images, 6 of them shown" in html
    assert html.count("data:image/jpeg") == 18


def test_an_image_of_a_gallery_and_of_a_contact_sheet_is_stored_once(tmp_path: Path) -> None:
    same = JPEG + bytes([5, 0, 0])
    shown = Gallery(query=same, results={"average": [Hit(image=same, score=0.5)]})
    html = render(tmp_path, ReportContent(title="t", galleries=[shown], sheets=[sheet(5, images=1)]))
    assert html.count("data:image/jpeg") == 3
    assert html.count("<symbol id=") == len(set(html.split('<symbol id="')[1:]))
    assert html.count('href="#i0"') == 3


def test_many_partitions_stay_bounded(tmp_path: Path) -> None:
    html = render(tmp_path, ReportContent(title="t", sheets=[sheet(k, images=50) for k in range(1, 101)]))
    assert "76 more partitions left out" in html
    assert html.count("data:image/jpeg") == 24 * 3 * 8
