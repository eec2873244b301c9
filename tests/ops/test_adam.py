from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grappa_dist.ops.adam import adam, is_fused


@pytest.mark.parametrize(("kind", "fused"), [("cuda", True), ("cuda:1", True), ("cpu", False), ("meta", False)])
def test_one_kernel_updates_all_on_a_gpu_alone(kind: str, fused: bool) -> None:
    assert is_fused(torch.device(kind)) is fused


def test_parameters_on_a_gpu_get_the_fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **how: asked.append(how))

    class OnGpu:
        device = torch.device("cuda", 0)

    adam([OnGpu()], 0.1, 0.01)  # type: ignore[list-item]
    adam([nn.Parameter(torch.ones(1))], 0.1)
    assert asked == [
        {"lr": 0.1, "weight_decay": 0.01, "fused": True},
        {"lr": 0.1, "weight_decay": 0.0, "fused": None},
    ]


def test_decay_is_added_to_the_gradient() -> None:
    """Then the first step is as long as the rate, whatever the decay; AdamW would shrink the weight by rate x decay."""
    weight = nn.Parameter(torch.tensor([4.0]))
    optimizer = adam([weight], 0.5, 1e-3)
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(3.5, abs=1e-4)
