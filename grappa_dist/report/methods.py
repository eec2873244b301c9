"""How each K was clustered: the method, why, and what its shortcuts cost."""

from __future__ import annotations

from grappa_dist.report.content import Clustering
from grappa_dist.report.markup import number, percent, table, text

LEAST_AGREEMENT = 0.95


def method_table(items: list[Clustering]) -> str:
    """The methods of all K; only a line where all are exact k-means without any extra."""
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
        "lists of centroids, measured on images drawn for it. Moved: images that a bound on the size of clusters took "
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
