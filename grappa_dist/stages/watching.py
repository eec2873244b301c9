"""What a job that trains a fusion says of its attention in every step. Shapes: b images, L layers, N sets."""

from __future__ import annotations

import math

import torch

from grappa_dist.models import Grappa


class AttentionWatch:
    """Sums over the images of a step: entropies of the attention by layer, mean weights by set.

    A model without attention has no such figures.
    """

    def __init__(self, model: Grappa) -> None:
        self._model, self._sets = model, model.layers[0].adaptors.num_sets
        self._entropy = torch.zeros(len(model.layers), dtype=torch.float64)
        self._shares = torch.zeros(self._sets, dtype=torch.float64)

    def add(self) -> None:
        """Of the images just seen: entropies as shares of log N, and weights as their mean over layers."""
        alpha = self._model.last_attention().double()  # (b, L, N)
        self._shares += alpha.mean(1).sum(0).cpu()
        if self._sets > 1:
            entropy = -(alpha * alpha.clamp_min(1e-30).log()).sum(-1) / math.log(self._sets)
            self._entropy += entropy.sum(0).cpu()

    def take(self, views: int, decay: float, count: float) -> dict[str, float]:
        """The figures of a step of `count` images, each seen in so many views; starts anew.

        Args:
            decay: of the weights of Q and K.
        """
        if all(layer.attention is None for layer in self._model.layers):
            return {}
        figures = {f"entropy.{i}": float(e) / views for i, e in enumerate(self._entropy)}
        figures |= {f"attention.{i}": float(share) / views for i, share in enumerate(self._shares)}
        ratios = decay_ratios(self._model, decay) if count else [0.0] * len(self._entropy)  # a NaN of none would spread
        figures |= {f"decay_to_gradient.{i}": ratio * count for i, ratio in enumerate(ratios)}
        self._entropy.zero_()
        self._shares.zero_()
        return figures


def decay_ratios(model: Grappa, decay: float) -> list[float]:
    """|weight decay| over |gradient| of Q and K by layer: above one, decay alone moves the attention.

    NaN where there is no gradient: the loss does not depend on that layer's attention, which tells of no balance.
    """
    ratios = []
    for layer in model.layers:
        parameters = list(layer.attention.parameters()) if layer.attention is not None else []
        norm = sum(float(p.detach().square().sum()) for p in parameters) ** 0.5
        gradient = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5
        ratios.append(decay * norm / gradient if gradient else math.nan)
    return ratios
