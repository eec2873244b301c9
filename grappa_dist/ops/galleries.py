"""Which adaptor sets suit a gallery, told from its images alone. Shapes: n images, D channels, N adaptor sets.

Being of one class is transitive: if two images are like a third one, they are like each other. So at the granularity
at which a gallery is searched, neighbours of neighbours should be neighbours. Where features are too coarse, classes
run into each other and this fails; where they are too fine, a class falls apart into pairs and chains, and it fails as
well.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10
_BLOCK = 1024  # rows at a time


def transitivity(z: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """For each image the share of its neighbours' k neighbours that are its own, (n,), from unit rows (n, D).

    Less than k + 1 images have n - 1 neighbours each; a single image has a share of zero.
    """
    k = min(k, len(z) - 1)
    if k < 1:
        return z.new_zeros(len(z))
    near = torch.cat([_nearest(z, start, k) for start in range(0, len(z), _BLOCK)])  # (n, k)
    shares = []
    for own in near.split(_BLOCK):
        theirs = near[own].flatten(1)  # (b, k * k)
        shares.append((theirs.unsqueeze(2) == own.unsqueeze(1)).any(2).float().mean(1))
    return torch.cat(shares)


def _nearest(z: Tensor, start: int, k: int) -> Tensor:
    """The k nearest other rows of a block of rows, (b, k)."""
    scores = z[start : start + _BLOCK] @ z.T
    own = torch.arange(len(scores), device=z.device)
    scores[own, own + start] = -torch.inf
    return scores.topk(k, 1).indices


def set_weights(shares: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Weights (N,) that sum to one, from the transitivity of every set, (N, n).

    A set weighs exp(-z^2 / 2), z being how many standard errors it falls short of the best one, image by image. So a
    gallery that does not tell the sets apart leaves them even, and a large one that does picks the best. Neighbourhoods
    overlap: n images count as n / k.
    """
    num_sets, images = shares.shape
    if images == 0:
        return torch.full((num_sets,), 1 / num_sets)
    means = shares.double().mean(1)
    behind = shares[means.argmax()].double() - shares.double()  # (N, n)
    error = behind.std(1, correction=0) * (k / images) ** 0.5
    z = behind.mean(1) / error.clamp_min(1e-12)
    weights = torch.exp(-z.square() / 2)
    return (weights / weights.sum()).float()
