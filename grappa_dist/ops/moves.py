"""What a pass of Lloyd's iterations asks of the rows of one block, and what it answers.

Shapes: D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 0.75  # of the rows: then all are searched, which is faster than picking them out

Take = Callable[[Tensor], Sequence[Tensor]]
"""Ascending places of a block -> its grid rows there, in pieces (p, D)."""


@dataclass(frozen=True)
class Moves:
    """Rows whose label changed, and how the labels were found."""

    rows: Tensor  # (m,) positions in the block
    before: Tensor  # (m,) int64, -1 on the first pass
    after: Tensor  # (m,) int64
    by_integers: int  # rows that no float could settle
    searched: int  # distances estimated

    @staticmethod
    def none(device: torch.device) -> Moves:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Moves(nothing, nothing, nothing, 0, 0)


def most_or_these(wanted: Tensor) -> Tensor:
    """Positions of the rows wanted; of all rows where most are."""
    rows = wanted.nonzero()[:, 0]
    return torch.arange(len(wanted), device=wanted.device) if len(rows) > _MOST * len(wanted) else rows
