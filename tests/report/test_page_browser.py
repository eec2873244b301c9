"""A full report in a real browser: on a screen and a phone, light and dark, and on paper."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from grappa_dist.report.content import ChangedQuery, ClusterSample, ContactSheet, Gallery, Hit, ReportContent
from grappa_dist.report.page import write_report
from grappa_dist.report.queries import ClassGain, Why, intervals_of
from grappa_dist.verdict import verdict_on
from tests.chromium import Tab, browsing
from tests.report.test_page import full, gallery, score
from tests.report.test_queries import task

WIDE, NARROW, PAPER = 1280, 390, 718  # CSS pixels; an A4 page within margins of 10 mm
LEAST_CONTRAST = 4.5  # of text, WCAG 2.1 AA
LONG = "a_very_long_name_of_a_folder_without_any_space_in_it/" * 2

CONTRAST = """() => {
  const channels = colour => { const found = colour.match(/[\\d.]+/g).map(Number); return [...found, 1].slice(0, 4); };
  const light = c => { const v = c / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest('title, .heat .in')) continue;  // cells have colours
    const style = getComputedStyle(element), isDrawn = element instanceof SVGElement;
    const text = channels(isDrawn ? style.fill : style.color);
    const [a, b] = [luminance(text), luminance(behind(element))].sort((x, y) => y - x);
    const name = element.tagName + '.' + element.className + ' ' + text + ' on ' + behind(element);
    found.set(name, (a + 0.05) / (b + 0.05));
  }
  return [...found];
}"""
TOO_WIDE = """() => [...document.querySelectorAll('main *')]
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('.store, title'))
  .map(element => `${element.tagName}.${element.className.baseVal ?? element.className}`)"""
FOLDED = """() => [...document.querySelectorAll('details:not([open])')]
  .map(fold => fold.lastElementChild.checkVisibility())"""  # whether what is in them is seen all the same
BROKEN = """async () => {
  const images = [...document.querySelectorAll('image')].map(image => image.getAttribute('href'));
  const failed = [];
  for (const source of new Set(images)) {
    const image = new Image(); image.src = source;
    try { await image.decode(); } catch { failed.push(source.slice(0, 60)); }
  }
  return [images.length, failed];
}"""


def picture(hue: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("HSV", (112, 80), (hue, 160, 200)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def report() -> ReportContent:
    """Every section, with long names, many tasks, and many classes."""
    names = ["birds", "cars", LONG, *(f"task {i}" for i in range(9))]
    tasks = [task(name, seed) for seed, name in enumerate(names)]
    models = ("backbone", "k=4", "k=8", "oracle", "average")
    hits = [Hit(image=picture(20 * i), score=0.9, correct=i % 2 == 0, name=f"{LONG}{i}.jpg") for i in range(5)]
    of_cluster = [picture(i) for i in range(6)]
    shown = {"backbone": hits, "average": hits[::-1]}
    query = Gallery(query=picture(230), task="birds", label=LONG, name=f"{LONG}q.jpg", results=shown)
    return replace(
        full(),
        rows=[score(model, name, 0.3 + i / 50) for i, model in enumerate(models) for name in names],
        intervals=intervals_of(tasks),
        verdict=verdict_on(tasks, ["backbone", "k=4", "k=8", "average"], "auto"),
        classes=[ClassGain(names[i % 12], i, 4, 0.5 + (i - 30) / 99, 0.5) for i in range(60)],
        class_names=[f"class {i} {LONG if i == 59 else ''}" for i in range(60)],
        changed=[ChangedQuery(why=w, gallery=query, value=0.1, baseline=0.9) for w in get_args(Why)],
        galleries=[query, gallery("cars", "cars", True)],
        sheets=[ContactSheet(k=4, clusters=[ClusterSample(pick="largest", label=0, size=9, images=of_cluster)])],
        facts={"command": f"grappa-dist run {LONG} --out {LONG}", "versions": "Python 3.11.7, " * 9},
        config_yaml=f"seed: 0\ndata:\n  train: [{LONG * 3}]\n",
    )


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = tmp_path_factory.mktemp("page")
    write_report(report(), folder)
    with browsing(WIDE) as tab:
        tab.page.goto((folder / "report.html").as_uri())
        yield tab


def show(tab: Tab, width: int, **media: Any) -> None:
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.page.emulate_media(**{"media": "screen", "color_scheme": "light", **media})


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_screen_text_is_legible_and_only_tables_scroll(tab: Tab, width: int, scheme: str) -> None:
    show(tab, width, color_scheme=scheme)
    pale = {name: ratio for name, ratio in tab.page.evaluate(CONTRAST) if ratio < LEAST_CONTRAST}
    assert pale == {}
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.errors == []


def test_on_paper_nothing_is_folded_or_cut_and_colours_are_those_of_a_light_page(tab: Tab) -> None:
    show(tab, PAPER)
    assert not any(tab.page.evaluate(FOLDED))
    show(tab, PAPER, media="print", color_scheme="dark")
    assert tab.page.evaluate(TOO_WIDE) == []
    assert all(tab.page.evaluate(FOLDED))
    assert {name: ratio for name, ratio in tab.page.evaluate(CONTRAST) if ratio < LEAST_CONTRAST} == {}
    assert tab.page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--card')") == "#fff"
    assert tab.page.pdf(format="A4").startswith(b"%PDF")


def test_every_image_can_be_decoded(tab: Tab) -> None:
    count, broken = tab.page.evaluate(BROKEN)
    assert count > 12
    assert broken == []


def test_headings_descend_one_level_at_a_time_and_tables_name_rows_and_columns(tab: Tab) -> None:
    levels = tab.page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    nameless = """[...document.querySelectorAll('table')].filter(table =>
        ![...table.tHead.rows[0].cells].every(cell => cell.tagName === 'TH' && cell.scope === 'col')
        || ![...table.tBodies[0].rows].every(row => row.cells[0].tagName === 'TH' && row.cells[0].scope === 'row'))"""
    assert tab.page.evaluate(f"({nameless}).length") == 0
    assert tab.page.evaluate("document.querySelectorAll('table').length") > 8
    targets = "[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href')))"
    assert tab.page.evaluate(targets)


def test_the_page_of_a_file_asks_for_nothing(tmp_path: Path, tab: Tab) -> None:
    asked = list[str]()
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.reload()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
