"""Which adaptor sets suit a gallery, told from its images alone. Shapes: n images, D channels, N adaptor sets.

Being of one class is transitive: if two images are like a third one, they are like each other. So at the granularity
at which a gallery is searched, neighbours of neighbours should be neighbours. Where features are too coarse, classes
run into each other and this fails; where they are too fine, a class falls apart into pairs and chains, and it fails as
well.

The figure has a bias: features of low intrinsic dimension score high whatever they mean, since on a curve neighbours of
neighbours are neighbours. It compares sets that were made alike, and says nothing about features of other kinds. Near-
copies would do the same (a set that has collapsed to a few points is perfectly transitive), so they are no neighbours.
The effective rank beside it shows a set that has lost dimensions; nothing is decided by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10
COPIES = 0.999  # cosine above which two images are near-copies
_BLOCK = 1024  # rows at a time
_ROUNDING = 1e-12  # variance of equal rows in float32, at most


def transitivity(z: Tensor, k: int = NEIGHBOURS, copies: float = COPIES) -> Tensor:
    """For each image the share of its neighbours' k neighbours that are its own, (n,), from unit rows (n, D).

    Less than k + 1 images have n - 1 neighbours each; a single image has a share of zero. Images whose cosine is above
    `copies` are no neighbours; an image that has less than k others stays with fewer, which count as not shared.
    """
    k = min(k, len(z) - 1)
    if k < 1:
        return z.new_zeros(len(z))
    near = torch.cat([_nearest(z, start, k, copies) for start in range(0, len(z), _BLOCK)])  # (n, k), -1 for none
    shares = []
    for own in near.split(_BLOCK):
        theirs = near[own].masked_fill_(own.unsqueeze(2) < 0, -1).flatten(1)  # (b, k * k)
        found = (theirs.unsqueeze(2) == own.unsqueeze(1)).any(2) & (theirs >= 0)
        shares.append(found.float().mean(1))
    return torch.cat(shares)


def effective_rank(z: Tensor) -> float:
    """Over how many dimensions the variance of unit rows (n, D) is spread: exp of its shares' entropy, or 0."""
    if len(z) < 2:
        return 0.0
    centred = (z - z.mean(0)).double()
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    if float(variances.sum()) <= _ROUNDING * len(z):
        return 0.0
    return float(torch.special.entr(variances / variances.sum()).sum().exp())


def _nearest(z: Tensor, start: int, k: int, copies: float) -> Tensor:
    """The k nearest other rows of a block of rows that are no near-copies, (b, k); -1 where there are fewer."""
    scores = z[start : start + _BLOCK] @ z.T
    own = torch.arange(len(scores), device=z.device)
    scores.masked_fill_(scores > copies, -torch.inf)
    scores[own, own + start] = -torch.inf
    best = scores.topk(k, 1)
    return best.indices.masked_fill(best.values.isinf(), -1)


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
