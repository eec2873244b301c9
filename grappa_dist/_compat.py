"""Lets torchvision, and so timm, import beside a CPU build of torch."""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def declare_torchvision_ops() -> None:
    """Declares the operators that a CUDA build of torchvision expects, once; does nothing beside a CUDA torch.

    The public torchvision wheel is a CUDA build. Beside a CPU torch its operators do not load, and importing it
    fails on registering fake kernels for operators that nobody declared. We use none of these operators.
    """
    global _library
    if torch.version.cuda is not None or _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
