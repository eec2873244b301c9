from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models import Backbone, Grappa
from grappa_dist.training.barlow_twins_loss import Projector, accumulate, barlow_twins
from grappa_dist.training.deepspeed_engine import Engine
from tests.models import tiny
from tests.processes import run_ranks

pytest.importorskip("deepspeed")
PAIRS, SIZE, CPU = 7, 16, torch.device("cpu")
NOISE = 3e-4  # float32, through batch norms and correlations of seven rows


class Fused(nn.Module):
    """A small fused ViT and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.grappa = Grappa(Backbone(tiny.create(depth=2), Preprocess(image_size=SIZE)), 3, 2, attention=True)
        self.projector = Projector(8, (6, 4))
        tiny.fill(self, seed=4, scale=0.4)
        self.grappa.trainable_attention()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.grappa(images)
        return features

    def loss(self, za: Tensor, zb: Tensor, allsum: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        return barlow_twins(self.projector(za, allsum), self.projector(zb, allsum), 0.05, allsum)

    def learning(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def views() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    first = torch.rand(PAIRS, 3, SIZE, SIZE, generator=draws)
    return first, (first + 0.3 * torch.rand(first.shape, generator=draws)).clamp(0, 1)


def expected() -> dict[str, Any]:
    """One process, the whole batch at once, plain autograd and a plain step."""
    module = Fused()
    first, second = views()
    loss = module.loss(module(first), module(second))
    loss.backward()
    learning = module.learning()
    grads = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
    torch.optim.SGD(learning.values(), lr=0.5).step()
    return {"loss": loss.item(), "grads": grads, "after": {name: p.detach() for name, p in learning.items()}}


def distance(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def look_at(module: Fused, seen: list[int]) -> None:
    seen.append(len(module.grappa.last_attention()))


def on_a_rank(comm: Comm, sizes: tuple[int, ...], micro_batches: tuple[int, ...]) -> list[dict[str, Any]]:
    results = []
    for micro_batch in micro_batches:
        module = Fused()
        seen: list[int] = []
        learning = module.learning()
        engine = Engine(module, torch.optim.SGD(learning.values(), lr=0.5), comm, CPU)
        images = torch.cat([view.split(list(sizes))[comm.rank] for view in views()])
        loss = accumulate(
            engine,
            module,
            images,
            partial(module.loss, allsum=comm.allsum),
            micro_batch=micro_batch,
            after=partial(look_at, module, seen),
        )
        grads = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
        engine.step(0.5)
        engine.close()
        after = {name: p.detach() for name, p in learning.items()}
        results.append({"loss": loss.item(), "grads": grads, "after": after, "seen": sum(seen), "parts": len(seen)})
    return results


MICRO_BATCHES = (1, 3, 2 * PAIRS, 100)


@pytest.mark.parametrize("sizes", [(7,), (5, 2), (1, 6), (7, 0)])
def test_accumulated_gradients_are_those_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    whole = expected()
    assert len(whole["grads"]) == 2 * 2 + 4  # Q and K of two layers; two linears, a scale and a shift
    for rank, results in enumerate(run_ranks(on_a_rank, len(sizes), sizes, MICRO_BATCHES)):
        for micro_batch, found in zip(MICRO_BATCHES, results, strict=True):
            assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert found["grads"].keys() == whole["grads"].keys()
            for name, gradient in whole["grads"].items():
                assert distance(found["grads"][name], gradient) < NOISE, name
                torch.testing.assert_close(found["after"][name], whole["after"][name], rtol=1e-4, atol=1e-4)
            assert found["seen"] == 2 * sizes[rank]  # every image once, though it is forwarded twice
            assert found["parts"] == -(-2 * sizes[rank] // micro_batch)


def test_rounding_noise_is_far_below_what_another_loss_would_change() -> None:
    whole, module = expected()["grads"], Fused()
    for first, second in zip(*(view.split(4) for view in views()), strict=True):  # summing losses of micro-batches
        (module.loss(module(first), module(second)) * (len(first) / PAIRS)).backward()
    for name, parameter in module.learning().items():
        assert parameter.grad is not None
        assert distance(parameter.grad, whole[name]) > 100 * NOISE, name


def test_what_learns_is_the_attention_and_the_projector() -> None:
    learning = Fused().learning()
    assert all(".attention." in name or name.startswith("projector.") for name in learning)
    assert learning.keys() == expected()["grads"].keys()
