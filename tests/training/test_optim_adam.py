from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grappa_dist.training.optim import BETA1, BETA2, EPS, adam, is_fused


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


def test_adaptors_and_classes_have_the_betas_and_the_eps_that_the_docs_state() -> None:
    of_adaptors = adam([nn.Parameter(torch.ones(1))], 0.1).defaults
    assert (*of_adaptors["betas"], of_adaptors["eps"]) == (BETA1, BETA2, EPS) == (0.9, 0.999, 1e-8)
    settings = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert "Betas 0.9 and 0.999, eps 1e-8, for adaptors and classifier alike" in " ".join(settings.split())
