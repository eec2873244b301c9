"""Norm-softmax, Eq. (2): cross entropy of scaled cosines. Shapes: B images of one rank, D channels, K classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_softmax_sum(z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Cross entropy of gamma * cos(z, weight), summed over the rows of z (B, D): a scalar, 0 for an empty share.

    Args:
        weight: (K, D), one row a class; its length does not matter, nor does that of a row of z.
        labels: (B,), integers in [0, K).
    """
    _check(z, weight, labels)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):  # a bf16 cosine times gamma = 16 is a logit off by up to 0.06
        cosines = F.normalize(z.to(dtype), dim=1) @ F.normalize(weight.to(dtype), dim=1).T  # (B, K)
        return F.cross_entropy(gamma * cosines, labels.long(), reduction="sum")


def norm_softmax(
    z: Tensor, weight: Tensor, labels: Tensor, gamma: float, *, allsum: Callable[[Tensor], Tensor] = lambda t: t
) -> Tensor:
    """Eq. (2): mean cross entropy of gamma * cos(z, weight) over the global batch, a scalar.

    `allsum` adds over ranks and lets gradients through (see dist/comm.py): ranks may hold uneven or empty shares.
    """
    total = norm_softmax_sum(z, weight, labels, gamma)
    return allsum(total) / allsum(total.new_tensor(len(z)))


def _check(z: Tensor, weight: Tensor, labels: Tensor) -> None:
    if z.ndim != 2 or weight.ndim != 2 or z.shape[1] != weight.shape[1]:
        raise ValueError(f"norm_softmax: z {tuple(z.shape)} and weight {tuple(weight.shape)} must be (B, D) and (K, D)")
    if labels.shape != z.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"norm_softmax: labels must be {len(z)} integers, one a row of z, got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        return
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(labels)).tolist())  # one wait for the device
    if low < 0 or high >= len(weight):  # cross_entropy would skip a label of -100 in silence
        raise ValueError(f"norm_softmax: labels must lie in [0, {len(weight)}), found {low} to {high}")
