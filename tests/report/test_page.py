"""The page: complete, escaped, bounded, and whole whatever is missing or broken."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grappa_dist.report import (
    BadRow,
    Clustering,
    Gallery,
    Hit,
    LabelFree,
    ReportContent,
    ScoreRow,
    write_report,
)
from tests.report.test_clusters import nesting, sheet

EVIL = "</style><script>alert('x')</script>\"'&\x00\ud800\u202e"
VOID = {"meta", "wbr"}  # tags of HTML that are never closed; those of SVG close themselves


def png(shade: int) -> bytes:
    """A grey image of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes([0, shade]))) + chunk(b"IEND", b"")


def score(model: str, task: str, value: float, queries: int = 50) -> ScoreRow:
    return ScoreRow(model=model, task=task, queries=queries, r_precision=value, map_at_r=value, recall_at_1=value)


def gallery(task: str | None, label: str | None, correct: bool | None) -> Gallery:
    hits = [Hit(image=png(i), score=0.9 - i / 10, correct=correct) for i in range(7)]
    return Gallery(query=png(200), task=task, label=label, results={"backbone": hits, "average": hits[::-1]})


def clustering(k: int) -> Clustering:
    return Clustering(
        k=k, inertia=[3.0, 2.0, 1.5], sizes=[0, 3, 9, 4], largest=7, median=2.5, imbalance=1.2,
        empty_repaired=1, empty_left=0, singletons_share=0.2, exact_share=0.001,
    )  # fmt: skip


def full(word: str = "cars") -> ReportContent:
    models = {"backbone": 0.35, "k=4": 0.41, "k=16": 0.33, "oracle": 0.41, "average": 0.4, "neighbours": 0.38}
    return ReportContent(
        title=f"Report {word}",
        rows=[score(m, t, v + bump) for m, v in models.items() for t, bump in ((word, 0.0), ("birds", 0.05))],
        label_free=[LabelFree(model="backbone", figure=f"view finds {word}", value=0.8, queries=9)],
        attention={"neighbours": {g: [[0.5, 0.5], [0.2, 0.8]] for g in ("all", word, "birds")}},
        entropy={"neighbours": [1.0, 0.72]},
        shares={"neighbours": [[0.5, 0.5], [0.4, 0.6], [0.3, 0.7]]},
        entropies={"neighbours": [[1.0, 0.9], [1.0, 0.8], [1.0, 0.72]]},
        decay={"neighbours": [12.0, 0.5]},
        sets=["k=4", "k=16"],
        clusterings=[clustering(4), clustering(16)],
        nestings=[nesting(4, 16)],
        sheets=[sheet(4), sheet(16)],
        curves={f"adapt k=4 {word}": [{"step": i, "loss": 1 / (i + 1), "odd" + word: 1.0} for i in range(5)]},
        galleries=[gallery(word, word, True), gallery("birds", word, False)],
        bad_rows=[BadRow(shard=f"{word}.tar", key=word, reason=word)],
        facts={word: word},
        config_yaml=f"seed: 0 # {word}",
        notes=[f"a note on {word}"],
    )


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def render(content: ReportContent, out: Path) -> str:
    """The page as text, after checks that hold for every page."""
    write_report(content, out)
    html = (out / "report.html").read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert not parser.names & {"script", "link", "iframe", "object"}
    assert "http://" not in html
    assert "https://" not in html
    assert 'nan"' not in html
    assert ">nan<" not in html
    return html


def test_the_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    content = full()
    write_report(content, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"rows": content.rows, "verdict": None}


def test_a_score_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    render(ReportContent(title="t", rows=[score("backbone", "a", math.nan)]), tmp_path)
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert row["r_precision"] is None
    assert row["queries"] == 50


def test_without_labels_the_report_succeeds_and_says_so(tmp_path: Path) -> None:
    content = replace(full(), rows=[], galleries=[gallery(None, None, None)])
    html = render(content, tmp_path)
    assert "The test images carry no labels" in html
    assert "nothing is marked" in html
    assert html.index('id="label-free"') < html.index('id="galleries"')
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"rows": [], "verdict": None}


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    html = render(full(EVIL), tmp_path)
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert "&lt;script&gt;" in html
    assert "\x00" not in html
    assert "\u202e" not in html


def test_the_best_of_each_task_is_marked(tmp_path: Path) -> None:
    html = render(full(), tmp_path)
    table = html[html.index('<table class="score">') : html.index("</table>")]
    best = [line for line in table.split("<tr") if "★" in line]
    assert len(best) == 1
    assert ">k=4<" in best[0]
    assert best[0].count("★") == 3  # two tasks and their mean


def test_the_reading_names_what_falls_below_the_backbone_and_the_distance_to_the_oracle(tmp_path: Path) -> None:
    html = render(full(), tmp_path)
    assert "k=16 on cars by 2.0; k=16 on birds by 2.0 points" in html
    assert "is 1.0 points above average" in html
    assert "neighbours runs from −2.0" in html


def test_uniform_attention_is_reported_to_equal_the_average(tmp_path: Path) -> None:
    even = {"neighbours": {"all": [[0.5, 0.5]] * 3}}
    html = render(ReportContent(title="t", attention=even, entropy={"neighbours": [0.9991] * 3}), tmp_path)
    assert "equals the average" in html
    assert "equals the average" not in render(full(), tmp_path)


@pytest.mark.parametrize(
    ("entropy", "decay", "text"),
    [
        (
            [1.0, 1.0, 0.7, 0.995],
            [7.0, 60.0, 9.0, 8.0],
            "layers 1 to 2, 4: decay of Q and K is 7 to 60 times {}, in",
        ),
        ([1.0, 1.0], [0.5, 3.0], "layers 1 to 2: decay of Q and K is 3 times {} (in layer 2)"),
        ([1.0, 1.0, 1.0], [math.nan, 2.0, 0.5], "layers 2 to 3: decay of Q and K is 2 times {} (in layer 2)"),
        ([0.5, 1.0], [9.0, 0.2], "layer 2; decay of Q and K did not exceed their gradient there"),
    ],
)
def test_uniform_layers_are_a_finding_with_their_decay_over_gradient(
    entropy: list[float], decay: list[float], text: str, tmp_path: Path
) -> None:
    content = ReportContent(title="t", entropy={"neighbours": entropy}, decay={"neighbours": decay})
    assert "attention is uniform in " + text.format("their gradient") in render(content, tmp_path)


def test_the_glossary_states_that_the_gallery_variant_uses_test_images(tmp_path: Path) -> None:
    assert "it sees the test images that are searched, and which task each belongs to" in render(full(), tmp_path)


def test_layers_that_are_not_uniform_have_no_reason(tmp_path: Path) -> None:
    content = ReportContent(title="t", entropy={"neighbours": [0.5, 0.6]}, decay={"neighbours": [9.0, 9.0]})
    assert "times their gradient" not in render(content, tmp_path)


def test_the_change_of_attention_in_training_is_drawn_for_each_set_and_layer(tmp_path: Path) -> None:
    html = render(full(), tmp_path)
    assert "Attention of each set, step by step" in html
    _, _, of_layers = html.partition("Entropy of each layer, step by step")
    assert "layer 2" in of_layers
    once = replace(full(), shares={"neighbours": [[0.5, 0.5]]}, entropies={"neighbours": [[1.0, 0.9]]})
    assert "step by step" not in render(once, tmp_path)


@pytest.mark.parametrize("name", [f.name for f in fields(ReportContent) if f.name != "title"])
def test_every_section_may_be_absent(name: str, tmp_path: Path) -> None:
    empty = ReportContent(title="t")
    render(replace(full(), **{name: getattr(empty, name)}), tmp_path)
    render(replace(empty, **{name: getattr(full(), name)}), tmp_path)


def test_figures_of_graphs_stand_apart_from_those_that_every_model_has(tmp_path: Path) -> None:
    figures = {"neighbours share the k=4 pseudo-label": 0.875, "neighbours share the k=16 pseudo-label": 0.625}
    shared = [LabelFree(model="neighbours", figure=f, value=v, queries=9, of_graph=True) for f, v in figures.items()]
    page = render(replace(full(), label_free=[*full().label_free, *shared]), tmp_path)
    section = page[page.index('id="label-free"') : page.index("</section>", page.index('id="label-free"'))]
    of_models, of_graphs = section.split("The neighbours that fusions learned from")
    assert "pseudo-label" not in of_models
    assert all(figure in of_graphs for figure in (*figures, "87.5", "62.5"))
    assert "backbone" not in of_graphs
    assert "that fusions learned from" not in render(full(), tmp_path)


def test_nothing_at_all_is_a_page(tmp_path: Path) -> None:
    assert "no attention to show" in render(ReportContent(title=""), tmp_path)


def test_huge_inputs_stay_bounded(tmp_path: Path) -> None:
    bad = [BadRow(shard="s.tar", key=f"key-{i}-" + "x" * 1000, reason=f"reason {i}") for i in range(100_000)]
    curve = [{"step": float(i), "loss": math.exp(-i / 1e4)} for i in range(100_000)]
    galleries = [gallery(f"task {i % 7}", "label", True) for i in range(2_000)]
    html = render(ReportContent(title="t", bad_rows=bad, curves={"adapt k=4": curve}, galleries=galleries), tmp_path)
    assert "100,000 images" in html
    assert "key-99-" in html
    assert "key-100-" not in html
    assert "more queries left out" in html
    assert "mean of about 625 values" in html
    assert len(html) < 2_000_000


def test_images_that_have_no_row_are_counted_among_the_bad_ones(tmp_path: Path) -> None:
    bad = [BadRow(shard="s.tar", key="a", reason="empty"), BadRow(shard="s.tar", key="", reason="missing", images=497)]
    html = render(ReportContent(title="t", bad_rows=bad), tmp_path)
    assert "498 images could not be read" in html
    assert re.search(r"missing<(?:(?!<tr).)*>497<", html)


def test_bad_images_are_listed_by_the_names_of_their_files_where_these_are_known(tmp_path: Path) -> None:
    bad = [BadRow(shard="s.tar", key="000000026", reason="empty file", file="b/<i>\udcff\x1b.jpg")]
    html = render(ReportContent(title="t", bad_rows=[*bad, BadRow(shard="s.tar", key="7", reason="cut")]), tmp_path)
    assert "b/&lt;i&gt;\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}.jpg" in html
    assert re.search(r"<th[^>]*>file<", html)
    nameless = render(ReportContent(title="t", bad_rows=[BadRow(shard="s.tar", key="7", reason="cut")]), tmp_path)
    assert not re.search(r"<th[^>]*>file<", nameless)


def test_an_image_that_comes_up_often_is_stored_once(tmp_path: Path) -> None:
    html = render(ReportContent(title="t", galleries=[gallery("a", "b", True)] * 5), tmp_path)
    assert html.count("data:image/png;base64,") == 8  # the query and seven hits, five of them shown by either model


def test_images_beyond_the_byte_limit_of_a_page_are_left_out(tmp_path: Path) -> None:
    big = Gallery(query=b"\xff\xd8\xff" + bytes(49 * 2**20), results={"average": [Hit(image=png(1), score=0.5)]})
    html = render(ReportContent(title="t", galleries=[big]), tmp_path)
    assert "page full" in html
    assert html.count("data:image") == 1


def test_bytes_that_are_no_image_are_not_embedded(tmp_path: Path) -> None:
    svg = Gallery(query=b"<svg onload='alert(1)'/>", results={"backbone": []})
    html = render(ReportContent(title="t", galleries=[svg]), tmp_path)
    assert "not an image" in html
    assert "nothing found" in html
    assert "onload" not in html


def test_values_that_are_not_finite_break_nothing(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    broken = replace(clustering(4), inertia=[nan, inf, 1.0], median=nan, imbalance=inf, singletons_share=nan)
    content = replace(
        full(),
        rows=[
            score("backbone", "a", nan),
            score("average", "a", 0.5),
            score("k=4", "a", inf),
            score("k=4", "b", 0.0, 0),
        ],
        label_free=[LabelFree(model="backbone", figure="f", value=nan, queries=0)],
        attention={"neighbours": {"all": [[nan, 1.0], [0.0, inf]], "ragged": [[1.0], [0.5, 0.5]], "none": []}},
        entropy={"neighbours": [nan, 0.5], "transforms": [nan]},
        clusterings=[broken, replace(broken, k=5, inertia=[], sizes=[])],
        nestings=[replace(nesting(4, 5), nestedness=nan, chance=nan)],
        curves={
            "fuse neighbours": [{"step": 0, "loss": nan}, {"step": 1, "loss": 1e300}, {"step": nan, "loss": 5e-324}],
            "adapt k=4": [{"step": 0, "loss": nan}],
        },
        galleries=[Gallery(query=png(0), results={"average": [Hit(image=png(1), score=nan)]})],
    )
    html = render(content, tmp_path)
    assert "1 value not finite" in html
    assert "its attention is broken" in html
