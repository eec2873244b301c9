"""What `evaluate` found as one page that needs no other file: figures with intervals, classes, and queries with images.

No scripts; an image that is shown often is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grappa_dist.console import pluralize
from grappa_dist.files import write_utf8
from grappa_dist.metrics import as_fractions
from grappa_dist.report.gallery import Images, small_jpeg
from grappa_dist.report.html import decimal, percent, points, table, text
from grappa_dist.report.page import document
from grappa_dist.report.verdict import describe_sureness
from grappa_dist.retrieval.results import describe_search, metric_name, shown_metrics, verdict_of
from grappa_dist.retrieval.scores import ClassScores, Evaluated, Lookup, Queries, Scores, most_changed, worst_queries
from grappa_dist.retrieval.sheet import HTML, THUMBNAIL_PX, thumbnail
from grappa_dist.verdict import Gain, caveats_on

MOST_CLASSES = 12  # with the largest gains, and as many with the largest losses
MOST_LISTED = 1000  # classes in the list of all
MOST_QUERIES = 12  # of each list
MOST_HITS = 5
DEFINITIONS = (
    "R is the number of images of the query's class in the gallery, without the query. R-Precision: the share of right "
    "images among the first R. MAP@R: the sum of the precision at each right image among the first R, divided by R. "
    "recall@k: the share of queries with a right image among the first k. precision@k: the share of right images among "
    "the first k. mAP@k: as MAP@R with k in place of the first R, divided by R. "
    "Intervals: 95 %, bootstrap over queries."
)


def check_page(path: Path) -> None:
    """Raises ValueError for a name that is not that of a page."""
    if path.suffix.lower() not in HTML:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(HTML)}")


def write_page(found: Evaluated, path: Path) -> None:
    """Writes the page.

    Raises:
        ValueError: the name is not that of a page.
    """
    check_page(path)
    write_utf8(path, score_page(found))


def score_page(found: Evaluated) -> str:
    """The page as HTML."""
    images = _Thumbnails(found.lookup)
    sections = [
        ("scores", "Scores", _scores(found)),
        ("all-tasks", "Among all tasks", _mixed(found)),
        ("classes", "Classes", _classes(found)),
    ]
    queries, about = found.queries, "; ".join(f"{name}: {what}" for name, what in found.models.items())
    if queries is not None and found.lookup is not None:
        model, *others = queries.rankings
        if others:
            better, worse = most_changed(queries, MOST_QUERIES)
            sections += [
                ("improved", "Most improved queries", _cards(queries, images, better, (model, *others))),
                ("worsened", "Most worsened queries", _cards(queries, images, worse, (model, *others))),
            ]
        worst = worst_queries(queries, model, MOST_QUERIES)
        sections.append(
            ("worst", f"Worst queries of {text(model, 60)}", _cards(queries, images, worst, (model, *others)))
        )
    sections.append(("left-out", "Left out", _left_out(found)))
    return document("Retrieval scores", sections, after=images.stored.definitions(), about=about)


class _Thumbnails:
    """Images by row id, read and made small once."""

    def __init__(self, lookup: Lookup | None) -> None:
        self.lookup, self.stored = lookup, Images()
        self._made: dict[int, bytes] = {}

    def draw(self, row: int, label: str) -> str:
        if row not in self._made:
            assert self.lookup is not None
            image = thumbnail(self.lookup.image(row))
            self._made[row] = b"" if image is None else small_jpeg(image, THUMBNAIL_PX)
        return self.stored.draw(self._made[row], label)


def _scores(found: Evaluated) -> str:
    verdict = f'<p class="verdict">{text(verdict_of(found), 600)}</p>' if found.gains else ""
    lead = describe_search(found)
    notes = [*found.remarks, *caveats_on(next(iter(found.scores.values())))]
    remarks = "".join(f'<p class="note">{text(note, 1000)}</p>' for note in (*notes, DEFINITIONS))
    return (
        f'{verdict}<p class="lead">{text(f"{lead[0].upper()}{lead[1:]}.", 600)}</p>'
        + _figures(found.scores, found.means)
        + _gains(found.gains, found.metric_gains)
        + remarks
    )


def _figures(scores: Mapping[str, Sequence[Scores]], means: Mapping[str, Scores]) -> str:
    metrics = ["r_precision", "map_at_r", *shown_metrics(next(iter(means.values())))]
    rows = [(model, of_task, of_task.task or "") for of_tasks in zip(*scores.values(), strict=True)
            for model, of_task in zip(scores, of_tasks, strict=True)]  # fmt: skip
    if len(rows) > len(scores):
        rows += [(model, mean, f"mean of {len(rows) // len(scores)} tasks") for model, mean in means.items()]
    body = [
        (text(name, 60), text(model, 40), *_cells(of_task, metrics), f"{of_task.queries:,}", f"{of_task.classes:,}")
        for model, of_task, name in rows
    ]
    return table(("task", "model", *map(metric_name, metrics), "queries", "classes"), body)


def _cells(scores: Scores, metrics: Sequence[str]) -> Iterator[str]:
    for metric in metrics:
        value, low, high = scores.figures[metric]
        yield f"{percent(value)}<br><small>{percent(low)}–{percent(high)}</small>"


def _gains(gains: Sequence[Gain], of_metrics: Mapping[str, Gain]) -> str:
    """What the first model gains, by task in R-Precision, and in each metric in the mean over tasks."""
    if not gains:
        return ""
    mean, *each = gains
    rows = [(text(gain.task or "", 60), gain) for gain in each]
    rows += [(f"mean of {len(each)} tasks", mean)] * (len(each) > 1)
    by_task = table(("R-Precision, points", "gain", "how sure"), [_gain(name, gain) for name, gain in rows])
    others = [(metric_name(metric), gain) for metric, gain in of_metrics.items() if metric != "r_precision"]
    if not others:
        return f"<h3>Gains</h3>{by_task}"
    by_metric = table(("other metrics, points", "gain", "how sure"), [_gain(name, gain) for name, gain in others])
    return (
        f'<h3>Gains</h3>{by_task}<details class="fold"><summary>Gains in other metrics</summary>{by_metric}</details>'
    )


def _gain(name: str, gain: Gain) -> tuple[str, ...]:
    ink = {"better": "ink-more", "worse": "ink-less", "unsure": ""}[gain.outcome]
    return name, f'<b class="{ink}">{points(gain.gain)}</b>', text(describe_sureness(gain))


def _mixed(found: Evaluated) -> str:
    if found.mixed is None:
        return ""
    lead = "The same queries among the images of all tasks; an image of another task is never right."
    return f'<p class="lead">{lead}</p>{_figures(found.mixed.scores, found.mixed.means)}' + _gains(
        found.mixed.gains, {}
    )


def _classes(found: Evaluated) -> str:
    """The classes that gain and lose most, or those with the least R-Precision; all of them in a fold."""
    classes = list(found.classes)
    if not classes:
        return ""
    if len(found.models) > 1:
        ordered = sorted(classes, key=lambda one: (-one.gain(), one.task, one.label))
        up = [one for one in ordered if one.gain() > 0][:MOST_CLASSES]
        down = [one for one in reversed(ordered) if one.gain() < 0][:MOST_CLASSES]
        same = sum(one.gain() == 0 for one in classes)
        shown = (
            f"<h3>Largest gains</h3>{_class_table(up)}<h3>Largest losses</h3>{_class_table(down)}"
            f'<p class="note">R-Precision. {pluralize(len(classes), "class", "classes")}: '
            f"{sum(one.gain() > 0 for one in classes):,} gain, {sum(one.gain() < 0 for one in classes):,} lose, "
            f"{same:,} stay.</p>"
        )
    else:
        ordered = sorted(classes, key=lambda one: (_first(one), one.task, one.label))
        shown = f"<h3>Least R-Precision</h3>{_class_table(ordered[:MOST_CLASSES])}"
    rest = len(classes) - MOST_LISTED
    more = f'<p class="note">{rest:,} more: --csv-classes FILE lists all.</p>' if rest > 0 else ""
    count = pluralize(len(classes), "class", "classes")
    listed = _class_table(classes[:MOST_LISTED])
    return f'{shown}<details class="fold"><summary>All {count}</summary>{listed}{more}</details>'


def _first(one: ClassScores) -> float:
    return next(iter(one.figures.values()))["r_precision"]


def _class_table(classes: Sequence[ClassScores]) -> str:
    if not classes:
        return '<p class="absent">None.</p>'
    models = list(classes[0].figures)
    several = len({one.task for one in classes}) > 1
    head = ("class", *(["task"] * several), "queries", *(text(model, 40) for model in models))
    body = []
    for one in classes:
        values = [percent(one.figures[model]["r_precision"]) for model in models]
        gain = [f"<b>{points(one.gain())}</b>"] * (len(models) > 1)
        body.append((text(one.label, 80), *([text(one.task, 60)] * several), f"{one.queries:,}", *values, *gain))
    return table((*head, *(["gain"] * (len(models) > 1))), body)


def _cards(queries: Queries, images: _Thumbnails, places: Sequence[int], models: Sequence[str]) -> str:
    if not places:
        return '<p class="absent">None.</p>'
    return f'<div class="cards">{"".join(_card(queries, images, place, models) for place in places)}</div>'


def _card(queries: Queries, images: _Thumbnails, place: int, models: Sequence[str]) -> str:
    assert images.lookup is not None
    row, label = int(queries.rows[place]), queries.class_names[queries.classes[place]]
    task = queries.task_names[queries.tasks[place]]
    query = (
        f'<div class="query"><span>query</span>{images.draw(row, f"query {label}")}<b>{text(label, 60)}</b>'
        f"<span>{text(task, 60)}<br>{text(images.lookup.name(row), 120)}</span></div>"
    )
    lanes = "".join(_lane(queries, images, place, model) for model in models)
    return f'<article class="card">{query}<div class="lanes">{lanes}</div></article>'


def _lane(queries: Queries, images: _Thumbnails, place: int, model: str) -> str:
    assert images.lookup is not None
    ranking, row = queries.rankings[model], int(queries.rows[place])
    figures = dict(zip(queries.metrics, as_fractions(ranking.units[place]).tolist(), strict=True))
    tally = f"R-Precision {percent(figures['r_precision'])}, MAP@R {percent(figures['map_at_r'])}"
    tiles = []
    for hit, cosine in zip(ranking.ids[place, :MOST_HITS].tolist(), ranking.cosines[place].tolist(), strict=False):
        if hit >= 0:
            right = images.lookup.same_class(row, hit)
            about = (
                f"{images.lookup.label(hit) or 'distractor'}, {images.lookup.name(hit)}, cosine {decimal(cosine, 3)}"
            )
            way, mark = ("right", "✓") if right else ("wrong", "✗")
            tiles.append(
                f'<div class="hit {way}">{images.draw(hit, about)}<i aria-hidden="true">{mark}</i>'
                f"<span>{decimal(cosine, 2)}</span></div>"
            )
    head = f"<p>{text(model, 40)}<small>{tally}</small></p>"
    return f'<div class="lane">{head}<div class="hits">{"".join(tiles)}</div></div>'


def _left_out(found: Evaluated) -> str:
    parts = []
    if found.unmatched:
        body = [tuple(text(part, 120) for part in query) for query in found.unmatched[:MOST_LISTED]]
        lead = f"{pluralize(len(found.unmatched), 'query', 'queries')} with no image of their class in the gallery"
        parts.append(f"<h3>{lead}</h3>{table(('file', 'task', 'class'), body, numeric=False)}")
    if found.bad:
        body = [(text(name, 120), text(why)) for name, why in found.bad[:MOST_LISTED]]
        lead = f"{pluralize(len(found.bad), 'image')} of {found.images:,} could not be read"
        parts.append(f"<h3>{lead}</h3>{table(('file', 'reason'), body, numeric=False)}")
    return "".join(parts)
