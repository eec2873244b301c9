"""Adam whose every row counts its own steps, so that rows may be left out of a step. Shapes: C rows, D channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.Adam's


@dataclass(frozen=True)
class RowState:
    """Parameters and what Adam knows of them, row by row."""

    rows: Tensor  # (C, D)
    mean: Tensor  # (C, D) running mean of the gradient
    square: Tensor  # (C, D) and of its square
    steps: Tensor  # (C,) int32, steps behind each row

    @classmethod
    def zeros(cls, num_rows: int, dim: int, device: torch.device) -> RowState:
        rows, mean, square = (torch.zeros(num_rows, dim, device=device) for _ in range(3))
        return cls(rows, mean, square, torch.zeros(num_rows, dtype=torch.int32, device=device))

    def at(self, where: slice | Tensor) -> RowState:
        """Some rows: a view for a slice, a copy for indices."""
        return RowState(self.rows[where], self.mean[where], self.square[where], self.steps[where])

    def put(self, where: Tensor, part: RowState) -> None:
        """Writes what `at(where)` gave, and was changed, back."""
        for name, tensor in part.tensors().items():
            self.tensors()[name][where] = tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "mean": self.mean, "square": self.square, "steps": self.steps}


def adam_step(state: RowState, gradient: Tensor, *, learning_rate: float, weight_decay: float) -> None:
    """One step of all rows of `state`, in place: torch.optim.Adam's, with weight decay as L2 in the gradient.

    `gradient` (C, D) is used as room.
    """
    steps = state.steps.add_(1).double()[:, None]  # 1 - 0.999 in float32 is off by 6e-5
    root, rate = (1 - BETA2**steps).sqrt().to(gradient), (learning_rate / (1 - BETA1**steps)).to(gradient)  # (C, 1)
    gradient.add_(state.rows, alpha=weight_decay)
    state.mean.lerp_(gradient, 1 - BETA1)
    state.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    size = torch.sqrt(state.square, out=gradient).div_(root).add_(EPS)
    move = torch.div(state.mean, size, out=size).mul_(rate)
    state.rows.sub_(move)
