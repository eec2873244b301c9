from __future__ import annotations

import torch
from torch import Tensor, nn

from grappa_dist.training.optim import RowState, adam_step

ROWS, DIM, STEPS, RATE, DECAY = 7, 3, 12, 0.1, 0.02


def gradient(step: int) -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(step))


def fresh() -> RowState:
    state = RowState.zeros(ROWS, DIM, torch.device("cpu"))
    state.rows.copy_(gradient(99))
    return state


def torch_adam(rows: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    parameter = nn.Parameter(rows.clone())
    optimizer = torch.optim.Adam([parameter], weight_decay=DECAY)
    for grad, rate in zip(gradients, rates, strict=True):
        parameter.grad = grad
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return parameter.detach()


def test_all_rows_together_move_as_under_torch_adam() -> None:
    state, rates = fresh(), [RATE / (step + 1) for step in range(STEPS)]
    expected = torch_adam(state.rows, [gradient(step) for step in range(STEPS)], rates)
    for step, rate in enumerate(rates):
        adam_step(state.at(slice(0, 3)), gradient(step)[:3], learning_rate=rate, weight_decay=DECAY)
        adam_step(state.at(slice(3, ROWS)), gradient(step)[3:], learning_rate=rate, weight_decay=DECAY)
    torch.testing.assert_close(state.rows, expected, rtol=1e-6, atol=1e-6)


def test_a_row_that_is_left_out_goes_on_as_if_the_step_had_not_been() -> None:
    state, start = fresh(), fresh().rows
    taken = [
        torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[: step % ROWS] for step in range(STEPS)
    ]
    for step, where in enumerate(taken):
        part = state.at(where)
        adam_step(part, gradient(step)[where], learning_rate=RATE, weight_decay=DECAY)
        state.put(where, part)
    for row in range(ROWS):
        steps = [step for step, where in enumerate(taken) if row in where]
        assert int(state.steps[row]) == len(steps)
        expected = torch_adam(start[row], [gradient(step)[row] for step in steps], [RATE] * len(steps))
        torch.testing.assert_close(state.rows[row], expected, rtol=1e-6, atol=1e-6)
