"""The page can do nothing: no script, no fetch, no form, whatever labels, tasks, files and settings are called."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.report import write_report
from grappa_dist.retrieval.evaluation import evaluate
from grappa_dist.retrieval.map import Layout
from grappa_dist.retrieval.map_page import MapContent, write_map
from grappa_dist.retrieval.score_page import write_page
from grappa_dist.retrieval.sheet import Strip, Tile, draw_sheet
from grappa_dist.stages.ground_truth import GroundTruth
from tests.report.test_page import full
from tests.stages import tiny

HOSTILE = [
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" style="background:url(https://host/x)" x="',
    "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'>",
    "--><!-- ]]> <![CDATA[",
    "<base href=https://host/><meta http-equiv=refresh content=0;url=https://host>",
    "&lt;script&gt; &#60;script&#62;",
    "a\x1b]0;title\x07\u202egpj.exe\u2066\u200b\ufeff\u2028",
    "\ud800\x00\U000e0041",
    "x" * 5000,
]
STYLE = re.compile(r"((left|width):-?\d+(\.\d+)?%;?|max-width:\d+px|--s:var\(--c\d\))+")


class Elements(HTMLParser):
    """Every element with its attributes, in order, and the texts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute is there twice"
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def page_of(word: str, out: Path) -> Elements:
    write_report(full(word), out)
    parser = Elements()
    parser.feed((out / "report.html").read_text(encoding="utf-8"))
    parser.close()
    return parser


@pytest.mark.parametrize("word", HOSTILE)
def test_names_from_outside_become_text_and_never_markup(word: str, tmp_path: Path) -> None:
    page, plain = page_of(word, tmp_path), page_of("cars", tmp_path)
    assert {tag for tag, _ in page.found} == {tag for tag, _ in plain.found}
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "object", "embed", "base", "form", "link", "img"}
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name, value in attributes.items():
            assert name not in ("src", "action", "srcset", "formaction", "xlink:href"), tag
            assert name != "href" or re.fullmatch(r"#[\w-]+|data:image/(jpeg|png);base64,[\w+/=]+", value), value
            assert name != "style" or STYLE.fullmatch(value), value
            assert not set(value) & set("\x1b\x07\u202e\u2066\u200b\ufeff\u2028\x00")
    assert not set("".join(page.texts)) & set("\x1b\x07\u202e\u2066\u200b\ufeff\u2028\x00")


@pytest.mark.parametrize("kind", ["scores", "sheet", "map"])
def test_pages_of_other_verbs_show_names_as_text(kind: str, tmp_path: Path) -> None:
    names = [word.replace("/", "\N{FRACTION SLASH}").replace("\x00", "")[:200] for word in HOSTILE]
    pages = {}
    for used in ("hostile", "plain"):
        folder = tmp_path / used
        for number, name in enumerate(names):
            for place in range(2):
                path = folder / os.fsdecode((name if used == "hostile" else str(number)).encode("utf-8", "replace"))
                path.mkdir(parents=True, exist_ok=True)
                (path / f"{place}{path.name if len(path.name) < 90 else ''}.png").write_bytes(tiny.picture(number))
        pages[used] = _page_of(kind, folder, names if used == "hostile" else ["a"] * len(names))
    hostile, plain = pages["hostile"], pages["plain"]
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in plain.found]
    named = [[sorted(attributes) for _, attributes in page.found] for page in (hostile, plain)]
    assert named[0] == named[1]
    texts = "".join(hostile.texts) + "".join(value for _, attributes in hostile.found for value in attributes.values())
    assert not set(texts) & set("\x1b\x07\u202e\u2066\u200b\ufeff\u2028\x00")


def _page_of(kind: str, folder: Path, names: list[str]) -> Elements:
    path = folder.with_suffix(".html")
    if kind == "scores":
        write_page(evaluate("tests.models.tiny:create", folder, against=None), path)
    elif kind == "sheet":
        draw_sheet(path, names[0], [Strip([Tile(None, name, name)], name) for name in names])
    else:
        count = len(names)
        ground_truth = GroundTruth(np.arange(count), np.zeros(count, int), names, names[:1], [])
        points = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
        write_map(
            path,
            MapContent(names[0], [Layout(names[1], points, 0.5)], names, ground_truth, names),
            lambda place: tiny.picture(place),
        )
    parser = Elements()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    return parser


def test_the_policy_allows_images_and_styles_of_the_page_itself_and_stands_before_anything_that_it_governs(
    tmp_path: Path,
) -> None:
    elements = page_of("cars", tmp_path).found
    policies = [(i, a["content"]) for i, (_, a) in enumerate(elements) if a.get("http-equiv")]
    ((position, policy),) = policies
    assert dict(rule.split(" ", 1) for rule in policy.split("; ")) == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [tag for tag, _ in elements[:position]] == ["html", "head", "meta"]
    assert elements[2][1] == {"charset": "utf-8"}
