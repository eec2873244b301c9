"""Adaptor sets that start at random and learn from image pairs alone: rows M+A_1 and M* of the paper's table.

The start is that of linear layers by default, in both halves of a bottleneck: ours, as the paper only says "random". So
the features of the first step are not the backbone's, and there is no zero that would leave attention without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.config import RANDOM
from grappa_dist.models import Adaptors, Grappa
from grappa_dist.training.batches import torch_seed


def num_random(variant: str, num_partitions: int) -> int:
    """Sets of a variant that start at random: one, as many as there are partitions, or none."""
    one, several = RANDOM
    return {one: 1, several: num_partitions}.get(variant, 0)


def start_at_random(model: Grappa, seed: int) -> None:
    """Fills all sets; set i is a function of seed and i, so the one set of M+A_1 is the first of M*."""
    first, sets = model.layers[0].adaptors, []
    for index in range(first.num_sets):
        draws = torch.Generator().manual_seed(torch_seed("random adaptors", seed, index))
        tensors: dict[str, Tensor] = {}
        for number in range(len(model.layers)):
            adaptors = Adaptors(1, first.dim, first.bottleneck)
            adaptors.randomise(draws)
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in adaptors.tensors(0).items()}
        sets.append(tensors)
    model.load_adaptors(sets)


def lars_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The parameters that learn, as LARS has to see them: sets lie side by side in one tensor and have a norm each."""
    adaptors = [m for m in module.modules() if isinstance(m, Adaptors) and m.up_bias.requires_grad]
    weights = [p for a in adaptors for p in (a.down_weight, a.up_weight)]
    biases = [p for a in adaptors for p in (a.down_bias, a.up_bias)]
    known = {id(p) for p in (*weights, *biases)}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    if not adaptors:
        return [{"params": others}]
    sets = {"params": weights, "sets": adaptors[0].num_sets}
    return [{"params": others}, sets, {"params": biases, "biases": True}]
