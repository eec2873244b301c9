"""Which way to cluster, and why: a function of the numbers of rows, labels and updates alone, never of the machine.

The choice changes the labels, so it must be the same wherever the run goes on. The dimension is left out for that
reason too: artefacts are named before a backbone is built.

Shapes: n rows, K labels, I updates, C = sqrt(K) coarse clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

Name = Literal["exact", "sampled", "hierarchical", "approximate"]
Assignment = Literal["exact", "approximate"]

PAIRS = 5 * 10**13
"""Pairs of row and centroid that `auto` compares without a shortcut: about a day of one core at 5 x 10^8 a second."""


@dataclass(frozen=True)
class Choice:
    """How one K is clustered."""

    name: Name
    assignment: Assignment  # of all rows, once the centroids stand
    reason: str


def choose(
    method: Name | Literal["auto"],
    assignment: Assignment | Literal["auto"],
    num_rows: int,
    num_labels: int,
    *,
    iterations: int,
) -> Choice:
    """Settles what is `auto`."""
    once = num_rows * num_labels
    flat = once * (iterations + 1)
    name: Name = method if method != "auto" else "exact" if flat <= PAIRS else "hierarchical"
    if method != "auto":
        reason = f"clustering.method is {method}"
    elif name == "exact":
        reason = f"{flat:.1e} pairs of row and centroid in {iterations} updates are at most {PAIRS:.0e}"
    else:
        coarse = num_rows * isqrt(num_labels) * (iterations + 1)
        reason = f"{flat:.1e} pairs of row and centroid would exceed {PAIRS:.0e}; the two levels take {2 * coarse:.1e}"
    if name in ("exact", "approximate"):
        return Choice(name, name, reason)
    if assignment != "auto":
        return Choice(name, assignment, f"{reason}; clustering.assignment is {assignment}")
    if once <= PAIRS:
        return Choice(name, "exact", f"{reason}; an exact assignment takes {once:.1e}")
    return Choice(name, "approximate", f"{reason}; an exact assignment would take {once:.1e}")
