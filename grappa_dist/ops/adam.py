"""The Adam of all that learns under the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def adam(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam with weight decay as L2 added to the gradient: the paper's, not AdamW. Betas and eps are torch's.

    On a GPU one kernel updates all parameters.
    """
    fused = is_fused(parameters[0].device) or None  # None: as torch does it on a CPU
    return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def is_fused(device: torch.device) -> bool:
    return device.type == "cuda"
