from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch

from grappa_dist.config import FuseConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.stages.fuse import BUCKET, least_bytes, projector_bytes
from grappa_dist.training.barlow_twins_loss import Projector
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.optim import Lars
from tests.kmeans.test_methods_memory import watched
from tests.processes import run_ranks
from tests.stages.tiny import CPU

WIDTHS = (1024, 1024, 1024, 1024)


@pytest.mark.parametrize(("widths", "ranks", "parts"), [((40,), 2, 2), ((24, 40), 1, 1), ((32, 32, 16), 8, 1)])
def test_a_fusion_needs_no_less_memory_than_predicted(widths: tuple[int, ...], ranks: int, parts: int) -> None:
    settings = FuseConfig(projector=widths, global_batch=16)
    trained = sum(linear.weight.numel() for linear in Projector(1000, widths).linears[1:])  # the first hangs on the ViT
    weights_gradients_copies_momentum, correlations = 4 * 4 * trained, 4 * widths[-1] ** 2
    assert least_bytes(settings, ranks) == weights_gradients_copies_momentum + correlations // parts
    assert least_bytes(settings, None) <= weights_gradients_copies_momentum + correlations


def test_no_more_gradients_are_copied_than_the_engine_takes_at_once() -> None:
    assert projector_bytes(3 * BUCKET) == 4 * (3 * 3 + 1) * BUCKET


def steps_of_a_projector(comm: Comm) -> int:
    """Bytes that this rank takes for a projector and two steps of it."""
    with watched() as seen:
        projector = Projector(WIDTHS[0], WIDTHS[1:])
        engine = Engine(projector, Lars([{"params": list(projector.parameters())}], lr=0.1), comm, CPU)
        for _ in range(2):
            engine.backward(engine.forward(torch.randn(4, WIDTHS[0])).square().mean())
            engine.step(0.1)
        engine.close()
    return seen.rise


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_takes_the_memory_predicted_for_a_projector(ranks: int) -> None:
    predicted = projector_bytes(sum(a * b for a, b in pairwise(WIDTHS)))
    for taken in run_ranks(twice, ranks):
        assert 0.85 * predicted < taken < 1.25 * predicted  # three copies would be 0.75; a rank alone sums nothing


def twice(comm: Comm) -> int:
    steps_of_a_projector(comm)  # loads libraries
    return steps_of_a_projector(comm)
