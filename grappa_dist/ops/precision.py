"""The precision of a forward pass, said in one place: on a GPU, matrix products in bfloat16 around float32 weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def forward_precision(device: torch.device, *, halves: bool | None = None) -> AbstractContextManager[object]:
    """What a module is called in; weights, their gradients and the optimizer's state stay float32 in any case.

    Args:
        halves: whether products are in bfloat16; None: as training does it there, on a GPU alone.
    """
    wanted = device.type == "cuda" if halves is None else halves
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()
