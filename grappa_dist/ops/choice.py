"""Which way to cluster, and why: a function of the numbers of rows, labels and updates alone, never of the machine.

The choice changes the labels, so it must be the same wherever the run goes on. The dimension is left out for a reason
of its own: artefacts are named before a backbone is built.

Shapes: n rows, K labels, I updates, C = sqrt(K) coarse clusters and as many lists, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

Name = Literal["exact", "sampled", "hierarchical", "approximate"]
AssignmentKind = Literal["exact", "approximate"]
Init = Literal["k-means++", "k-means||"]
FLAT: tuple[Name, ...] = ("exact", "sampled")
"""Methods that fit all centroids at once, not on two levels."""

PAIRS = 5 * 10**13
"""Pairs of row and centroid that `auto` spends on one part: about a day and a half of one core (docs/scale.md)."""

PLUS_PLUS_LABELS, PLUS_PLUS_ROWS = 2**17, 8
"""`auto` draws up to so many centroids by k-means++, which reads the rows the more often the more there are; and all of
them where there are fewer rows per centroid than that, since k-means|| would have most rows for candidates."""


@dataclass(frozen=True)
class Size:
    """What the cost depends on."""

    rows: int
    labels: int
    iterations: int
    probes: int

    def fit_pairs(self, name: Name, sample_rows: int = 0) -> int:
        """Pairs of row and centroid that a fit compares, bounds left aside.

        exact: n K (I + 1). hierarchical: n C (I + 1) for either level. approximate: the same, then per update n C heads
        and n p K / C centroids. sampled: m K (I + 1) for m sampled rows.
        """
        passes, level = self.iterations + 1, self.rows * isqrt(self.labels)
        two_levels = 2 * level * passes
        return {
            "exact": self.rows * self.labels * passes,
            "sampled": sample_rows * self.labels * passes,
            "hierarchical": two_levels,
            "approximate": two_levels + level * (1 + self.probes) * passes,
        }[name]


@dataclass(frozen=True)
class Choice:
    """How one K is clustered."""

    name: Name
    assignment: AssignmentKind  # of all rows, once the centroids stand
    reason: str
    init: Init = "k-means++"  # of the flat fit: of all centroids, or of the coarse ones where there are two levels


def choose(
    method: Name | Literal["auto"],
    assignment: AssignmentKind | Literal["auto"],
    init: Init | Literal["auto"],
    size: Size,
) -> Choice:
    """Settles what is `auto`: the method of lowest inertia whose fit is affordable, the assignment likewise."""
    name, reason = _method(method, size)
    assigned, because = _assignment(name, assignment, size)
    found = _init(init, size.rows, size.labels if name in FLAT else isqrt(size.labels))
    started = "; first centroids by k-means||" if found == "k-means||" else ""
    return Choice(name, assigned, reason + because + started, found)


def _assignment(name: Name, assignment: AssignmentKind | Literal["auto"], size: Size) -> tuple[AssignmentKind, str]:
    if name == "exact":
        return "exact", ""
    once = size.rows * size.labels
    if assignment != "auto":
        return assignment, f"; clustering.assignment is {assignment}"
    if once <= PAIRS:
        return "exact", f"; exact labels at the end take {once:.1e} pairs"
    return "approximate", f"; exact labels at the end would take {once:.1e} pairs"


def _init(init: Init | Literal["auto"], rows: int, labels: int) -> Init:
    if init != "auto":
        return init
    return "k-means||" if labels > PLUS_PLUS_LABELS and rows >= PLUS_PLUS_ROWS * labels else "k-means++"


def _method(method: Name | Literal["auto"], size: Size) -> tuple[Name, str]:
    if method != "auto":
        return method, f"clustering.method is {method}"
    exact, lists, levels = (size.fit_pairs(name) for name in ("exact", "approximate", "hierarchical"))
    if exact <= PAIRS:
        return "exact", f"exact k-means takes {exact:.1e} pairs of row and centroid, at most {PAIRS:.0e} are spent"
    too_dear = f"exact k-means would take {exact:.1e} pairs of row and centroid, more than {PAIRS:.0e}"
    if lists <= PAIRS:
        return "approximate", f"{too_dear}; two levels and updates through lists take {lists:.1e}"
    return "hierarchical", f"{too_dear}, and updates through lists {lists:.1e}; two levels take {levels:.1e}"
