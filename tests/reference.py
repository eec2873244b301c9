"""Every op once more, the slow and obvious way, to compare the fast ones with. Any float dtype, one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def norm_softmax(z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Eq. (2), image by image and class by class."""
    losses = []
    for image, label in zip(z, labels.tolist(), strict=True):
        logits = torch.stack([gamma * (image @ w) / (image.norm() * w.norm()) for w in weight])
        losses.append(-torch.log(logits[label].exp() / logits.exp().sum()))
    return torch.stack(losses).mean()


def barlow_twins(za: Tensor, zb: Tensor, beta: float) -> Tensor:
    """Eq. (4), entry by entry of the correlation matrix."""
    columns_a = [(a - a.mean()) / (a.var(unbiased=False) + 1e-5).sqrt() for a in za.T]
    columns_b = [(b - b.mean()) / (b.var(unbiased=False) + 1e-5).sqrt() for b in zb.T]
    loss = za.new_zeros(())
    for n, a in enumerate(columns_a):
        for m, b in enumerate(columns_b):
            correlation = (a * b).mean()
            loss = loss + ((1 - correlation) ** 2 if n == m else beta * correlation**2)
    return loss


def retrieval(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> dict[str, float]:
    """Leave-one-out metrics from all pairs of scores (n, n), query by query; ties by row id."""
    totals = {"r_precision": 0.0, "map_at_r": 0.0, "recall_at_1": 0.0, "queries": 0}
    for query, label in enumerate(labels):
        gallery = [row for row in range(len(labels)) if labels[row] >= 0 and row != query]
        size = sum(labels[row] == label for row in gallery)
        if label < 0 or size == 0:
            continue
        ranked = sorted(gallery, key=lambda row: (-scores[query][row], row))
        relevant = [labels[row] == label for row in ranked[:size]]
        totals["queries"] += 1
        totals["recall_at_1"] += relevant[0]
        totals["r_precision"] += sum(relevant) / size
        totals["map_at_r"] += sum(sum(relevant[: i + 1]) / (i + 1) for i in range(size) if relevant[i]) / size
    return {name: value if name == "queries" else value / max(totals["queries"], 1) for name, value in totals.items()}


def lars_step(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float, eta: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New parameter and new momentum buffer after one step of LARS."""
    if param.ndim > 1:
        grad = grad + weight_decay * param
        param_norm = math.sqrt(sum(v * v for v in param.flatten().tolist()))
        grad_norm = math.sqrt(sum(v * v for v in grad.flatten().tolist()))
        if param_norm > 0 and grad_norm > 0:
            grad = grad * (eta * param_norm / grad_norm)
    momentum_buffer = momentum * momentum_buffer + grad
    return param - lr * momentum_buffer, momentum_buffer


def kmeans(x: Tensor, centroids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lloyd's centroids (K, D) and the labels (n,) nearest to them: Euclidean, ties low, an empty cluster stays."""

    def nearest(point: Tensor) -> int:
        distances = [float((point - c).square().sum()) for c in centroids]
        return distances.index(min(distances))

    for _ in range(steps):
        labels = [nearest(point) for point in x]
        means = []
        for k, old in enumerate(centroids):
            members = [point for point, label in zip(x, labels, strict=True) if label == k]
            means.append(torch.stack(members).mean(0) if members else old)
        centroids = torch.stack(means)
    return centroids, torch.tensor([nearest(point) for point in x])


def knn(scores: Sequence[Sequence[float]], k: int) -> list[list[int]]:
    """The k best other rows of each row from all pairs of scores (n, n), best first; ties by row id."""
    rows = range(len(scores))
    return [sorted((r for r in rows if r != query), key=lambda r: (-scores[query][r], r))[:k] for query in rows]


def grappa_layer(
    h_prev: Tensor, block: Any, downs: Sequence[nn.Module], ups: Sequence[nn.Module], q: nn.Module, k: nn.Module
) -> Tensor:
    """Algorithm 1 to the letter: the output (B, T, D) of one fused layer around a plain pre-norm ViT block.

    `block` has norm1, attn, norm2 and mlp (layer scale and drop path, if any, are identities); `downs` and `ups` are
    both projections of the N adaptors, `q` and `k` the projections of the attention over them.
    """
    x: Tensor = h_prev + block.attn(block.norm1(h_prev))  # (B, T, D)
    y = block.mlp(block.norm2(x))
    h = x + y
    outputs = [
        up(nn.functional.gelu(down(h))) + y for down, up in zip(downs, ups, strict=True)
    ]  # N times U_i (B, T, D)
    query = q(h.mean(1))  # (B, D)
    logits = [(query * k(u.mean(1))).sum(1) / math.sqrt(h.shape[-1]) for u in outputs]  # N times (B,)
    alpha = torch.softmax(torch.stack(logits, dim=1), dim=1)  # (B, N)
    fused = torch.zeros_like(h)
    for i, u in enumerate(outputs):
        fused = fused + alpha[:, i, None, None] * u
    return fused + x
