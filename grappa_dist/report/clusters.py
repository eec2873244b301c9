"""The partitions: the method of each and what it approximates, their nestedness, and images of sample clusters."""

from __future__ import annotations

import math

from grappa_dist.console import pluralize
from grappa_dist.report.content import Clustering, ClusterSample, Nesting, ReportContent
from grappa_dist.report.gallery import Images
from grappa_dist.report.html import decimal, number, percent, table, text

LEAST_AGREEMENT = 0.95
MOST_SHEETS = 24  # partitions with sample clusters
OPEN = 4  # of them unfolded at first
MOST_CLUSTERS = 8  # of a partition
MOST_IMAGES = 8  # of a cluster
_PICKS = {"largest": "largest", "median": "of median size", "drawn": "drawn at random"}


def method_table(items: list[Clustering]) -> str:
    """The methods of all K as a table; one line if all are plain exact k-means."""
    if all(c.method == "exact" and c.bound is None and not c.restarts for c in items):
        return '<p class="note">All by exact k-means: every image has the label of its nearest centroid.</p>'
    head = ["K", "method", "fitted to", "exact labels", "largest allowed", "moved", "restarts"]
    body = [
        [
            f"k={c.k}",
            c.method,
            f"{percent(c.sampled_share)} % of images",
            _agreement(c),
            "any" if c.bound is None else f"{c.bound:,}",
            _moved(c),
            _restarts(c),
        ]
        for c in items
    ]
    note = (
        '<p class="note">Fitted to: the images that the centroids were computed from; a share below 100 % is a sample. '
        "Exact labels: images whose label is that of the nearest of all centroids; where labels were found through "
        "inverted lists, measured on a random sample. Moved: images that a bound on the size of clusters moved "
        "to another cluster, and by how much inertia rose. Restarts: their number, and how far the worst lies above "
        "the one taken.</p>"
    )
    low = [f"k={c.k}" for c in items if c.agreement is not None and c.agreement < LEAST_AGREEMENT]
    warning = (
        f'<p class="note"><strong>{", ".join(low)}: fewer than {percent(LEAST_AGREEMENT)} % of the labels are the '
        "exact ones; a larger clustering.probes brings more.</strong></p>"
    )
    why = "".join(f"<li>k={c.k}: {c.method}, {text(c.reason)}</li>" for c in items if c.reason)
    reasons = f'<details class="fold"><summary>Why these methods</summary><ul>{why}</ul></details>'
    return table(head, body) + note + (warning if low else "") + reasons


def _agreement(c: Clustering) -> str:
    return "all" if c.agreement is None else f"{percent(c.agreement, 2)} % of {c.agreement_rows:,}"


def _moved(c: Clustering) -> str:
    if not c.moved or not c.unbalanced_inertia:
        return f"{c.moved:,}"
    return f"{c.moved:,} (inertia +{percent(c.inertia[-1] / c.unbalanced_inertia - 1, 2)} %)"


def _restarts(c: Clustering) -> str:
    if not c.restarts:
        return "none"
    above = max(c.restarts) / min(c.restarts) - 1 if min(c.restarts) else 0.0
    return f"{number(len(c.restarts))} (+{percent(above, 2)} %)"


def nesting_table(content: ReportContent) -> str:
    """Consecutive partitions with their nestedness, that by chance, and the nestedness adjusted for chance."""
    if not content.nestings:
        return ""
    items = sorted(content.nestings, key=lambda n: n.coarse)
    lead = (
        "<h3>How nested they are</h3>"
        '<p class="lead">The share of images whose cluster at K is the one that most images of their finer cluster '
        "are in. 100 % means that each finer cluster lies within one coarser cluster, as in a hierarchy; k-means finds "
        "each partition by itself, so nothing forces that.</p>"
    )
    head = ["finer in coarser", "nestedness", "by chance", "adjusted"]
    body = [
        [f"k={n.fine} in k={n.coarse}", _meter(n.nestedness), f"{percent(n.chance)} %", decimal(_adjusted(n), 3)]
        for n in items
    ]
    note = (
        "By chance: the same with the coarser labels permuted over the images, so cluster sizes are kept. Adjusted: "
        f"1 is nested, 0 is no more than chance. {_rows(items[0])}"
    )
    return lead + table(head, body) + f'<p class="note">{note}</p>'


def _adjusted(n: Nesting) -> float:
    """(nestedness - chance) / (1 - chance); NaN if chance is 1."""
    return (n.nestedness - n.chance) / (1 - n.chance) if n.chance < 1 else math.nan


def _meter(share: float) -> str:
    wide = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    return f'{percent(share)} %<span class="meter"><i style="width:{wide:.1%}"></i></span>'


def _rows(n: Nesting) -> str:
    if n.rows >= n.of:
        return f"Computed on all {pluralize(n.of, 'image')} but those that do not decode."
    return (
        f"<b>Computed on a random sample of {n.rows:,} of {n.of:,} images</b>, the same for every pair; "
        "a sample has smaller clusters, which raises nestedness and chance alike."
    )


def contact_sheets(content: ReportContent, images: Images) -> str:
    """Some clusters of every partition, with some images of each."""
    if not any(sheet.clusters for sheet in content.sheets):
        return ""
    sheets = sorted(content.sheets, key=lambda s: s.k)
    lead = (
        '<h3>Sample clusters</h3><p class="lead">Of each partition the largest cluster, the one of median size, and '
        "clusters drawn at random, with images drawn from each. Do the images of a cluster belong together, and does "
        "a larger K separate finer things?</p>"
    )
    folds = []
    for place, sheet in enumerate(sheets[:MOST_SHEETS]):
        shown = sheet.clusters[:MOST_CLUSTERS]
        strips = "".join(_strip(sheet.k, cluster, images) for cluster in shown)
        count = f"{len(shown)} of {pluralize(sheet.k, 'cluster')}"
        head = f"<summary>k={sheet.k} <small>{count}</small></summary>"
        opened = " open" if place < OPEN else ""
        folds.append(f'<details class="fold"{opened}>{head}<div class="strips">{strips}</div></details>')
    left = len(sheets) - MOST_SHEETS
    rest = f'<p class="note">{pluralize(left, "more partition")} left out.</p>' if left > 0 else ""
    return lead + "".join(folds) + rest


def _strip(k: int, cluster: ClusterSample, images: Images) -> str:
    shown = cluster.images[:MOST_IMAGES]
    size = pluralize(cluster.size, "image")
    some = f", {len(shown)} of them shown" if len(shown) < cluster.size else ""
    head = f"<p>{_PICKS[cluster.pick]}<small>{size}{some}</small></p>"
    tip = f"k={k}, cluster {cluster.label}"
    tiles = "".join(images.draw(image, tip) for image in shown)
    return f'<div class="strip">{head}<div class="shots">{tiles}</div></div>'
