"""Queries with the images that each model retrieves for them. An image that is shown often is stored once."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from grappa_dist.console import pluralize
from grappa_dist.report.content import ChangedQuery, Gallery, Hit
from grappa_dist.report.html import decimal, percent, text
from grappa_dist.report.queries import MOST_CHANGED, Why
from grappa_dist.report.scores import ordered

MOST_GALLERIES = 96  # in the page
MOST_HITS = 5  # of a model
MOST_MODELS = 16  # of a query
MOST_BYTES = 48 * 2**20  # of images in the page, all together
_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif"}


class Images:
    """The images of a page: each is stored once and may be drawn any number of times."""

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}
        self._bytes_left = MOST_BYTES

    def draw(self, image: bytes, label: str) -> str:
        """A square tile with the image; an empty one for bytes of unknown format, and when the page is full."""
        if _format(image) is None:
            return f'<span class="tile blank" title="{text(label)}">not an image</span>'
        if image not in self._ids:
            if len(image) > self._bytes_left:
                return f'<span class="tile blank" title="{text(label)}">left out, page full</span>'
            self._bytes_left -= len(image)
            self._ids[image] = len(self._ids)
        place = self._ids[image]
        name = f'role="img" aria-label="{text(label)}"'
        return (
            f'<svg class="tile" viewBox="0 0 100 100" {name}><title>{text(label)}</title><use href="#i{place}"/></svg>'
        )

    def definitions(self) -> str:
        """The images themselves, as symbols without a box of their own."""
        symbols = "".join(
            f'<symbol id="i{place}" viewBox="0 0 100 100"><image width="100" height="100" '
            f'href="data:image/{_format(image)};base64,{base64.b64encode(image).decode()}"/></symbol>'
            for image, place in self._ids.items()
        )
        return f'<svg class="store" width="0" height="0" aria-hidden="true">{symbols}</svg>' if symbols else ""


def small_jpeg(image: Image.Image, side_px: int) -> bytes:
    """A JPEG file of an image whose longer side has at most so many pixels."""
    image.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _format(image: bytes) -> str | None:
    """The format by the first bytes; no vector format, as these may contain scripts."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), None)


def galleries(items: Sequence[Gallery], images: Images) -> str:
    """All galleries as markup: one fold a task, the first one open."""
    by_task: dict[str | None, list[Gallery]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    share = max(1, MOST_GALLERIES // len(by_task))
    folds, shown = [], 0
    for place, (task, group) in enumerate(list(by_task.items())[:MOST_GALLERIES]):
        cards = "".join(_card(images, item) for item in group[:share])
        shown += len(group[:share])
        name = "All images" if task is None else text(task, 60)
        count = pluralize(len(group[:share]), "query", "queries")
        head = f"<summary>{name} <small>{count}</small></summary>"
        folds.append(
            f'<details class="fold"{" open" if not place else ""}>{head}<div class="cards">{cards}</div></details>'
        )
    left = len(items) - shown
    rest = f'<p class="note">{pluralize(left, "more query", "more queries")} left out.</p>' if left else ""
    return "".join(folds) + rest


def changed_section(items: Sequence[ChangedQuery], model: str, images: Images) -> str:
    """Queries that improved or worsened most and those that the model is worst on, a fold for each; "" without any."""
    if not items:
        return ""
    lead = (
        f'<p class="lead">Single queries by their R-Precision under {text(model, 40)} and under the backbone, each '
        "with its nearest images under both, in order. ✓ is an image of the query's class, ✗ one of another class. Of "
        "equal queries one of each class is shown first.</p>"
    )
    titles: dict[Why, str] = {
        "improved": "Improved most",
        "worsened": "Worsened most",
        "worst": f"{model} is worst on",
    }
    folds = list[str]()
    for why, title in titles.items():
        group = sorted((item for item in items if item.why == why), key=_by_size)[:MOST_CHANGED]
        if not group:
            continue
        cards = "".join(_card(images, item.gallery, _figures(item, model), named=True) for item in group)
        head = f"<summary>{text(title, 60)} <small>{pluralize(len(group), 'query', 'queries')}</small></summary>"
        is_open = " open" if not folds else ""
        folds.append(f'<details class="fold"{is_open}>{head}<div class="cards">{cards}</div></details>')
    return lead + "".join(folds)


def _by_size(item: ChangedQuery) -> float:
    """The largest change first, of the worst queries the lowest figure."""
    return round(item.value if item.why == "worst" else -abs(item.value - item.baseline), 9)


def _figures(item: ChangedQuery, model: str) -> str:
    lines = ("R-Precision, %:", f"backbone {percent(item.baseline)}", f"{text(model, 40)} {percent(item.value)}")
    return "".join(f"<span>{line}</span>" for line in lines)


def _card(images: Images, item: Gallery, figures: str = "", *, named: bool = False) -> str:
    """A query and its lanes.

    Args:
        figures: markup below the query.
        named: whether the files of the hits are named below them.
    """
    models = ordered(item.results)[:MOST_MODELS]
    caption = "" if item.label is None else f"<b>{text(item.label, 60).replace('_', '_<wbr>')}</b>"
    caption += f"<small>{text(item.name, 120)}</small>" if item.name else ""
    task = f" in {text(item.task, 60)}" if named and item.task else ""
    about = " ".join(filter(None, ["query", item.label, item.name]))
    query = f'<div class="query"><span>query{task}</span>{images.draw(item.query, about)}{caption}{figures}</div>'
    lanes = "".join(_lane(images, model, item.results[model][:MOST_HITS], named=named) for model in models)
    return f'<article class="card">{query}<div class="lanes">{lanes}</div></article>'


def _lane(images: Images, model: str, hits: Sequence[Hit], *, named: bool) -> str:
    labelled = [hit for hit in hits if hit.correct is not None]
    right = sum(bool(hit.correct) for hit in labelled)
    tally = f"<small>{right} of {len(labelled)}</small>" if labelled else ""
    tiles = "".join(_tile(images, place, hit, named=named) for place, hit in enumerate(hits, start=1))
    found = f'<div class="hits">{tiles}</div>' if tiles else "<em>nothing found</em>"
    return f'<div class="lane"><p>{text(model, 40)}{tally}</p>{found}</div>'


def _tile(images: Images, place: int, hit: Hit, *, named: bool) -> str:
    way, mark, word = {
        True: ("right", "✓", ", correct"),
        False: ("wrong", "✗", ", incorrect"),
        None: ("", "", ""),
    }[hit.correct]
    badge = f'<i aria-hidden="true">{mark}</i>' if mark else ""
    name = f": {hit.name}" if hit.name else ""
    tile = images.draw(hit.image, f"rank {place}, cosine {decimal(hit.score, 3)}{word}{name}")
    below = f"<small>{text(hit.name.rpartition('/')[2], 60)}</small>" if named and hit.name else ""
    return f'<div class="hit {way}">{tile}{badge}<span>{decimal(hit.score, 2)}</span>{below}</div>'
