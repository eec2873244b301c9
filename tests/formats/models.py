"""Models of every variant and family, small enough to be exported in seconds."""

from __future__ import annotations

import torch

from grappa_dist.export import RetrievalModel
from grappa_dist.models import Backbone, Grappa, create_backbone
from tests.models import tiny
from tests.models.test_grappa_whole import PREPROCESS

BOTTLENECK = 3
SETS = {"backbone": 0, "k=4": 1, "average": 2, "transforms": 2, "neighbours": 2, "gallery": 2}
LEARNED = ("transforms", "neighbours")


def model(name: str = tiny.TIMM, variant: str = "neighbours") -> RetrievalModel:
    """Random weights, none of them at a kind zero or one; of the variant `gallery` with those of a gallery.

    Args:
        name: timm:<model>, or "own" for a user's module.
    """
    backbone = _backbone(name)
    grappa = Grappa(backbone, SETS[variant], BOTTLENECK, attention=variant in LEARNED)
    for seed, layer in enumerate(grappa.layers, start=10 * list(SETS).index(variant)):
        tiny.fill(layer, seed)
    found = RetrievalModel(grappa, [f"k={number}" for number in range(SETS[variant])])
    if variant == "gallery":
        found.weigh(torch.tensor([0.2, 0.8]))
    return found


def _backbone(name: str) -> Backbone:
    if name == "own":
        return Backbone(tiny.create(), PREPROCESS)
    size = 28 if "patch14" in name else 32
    backbone = create_backbone(name, {**tiny.TIMM_KWARGS, "img_size": size}, {}, pretrained=False)
    tiny.fill(backbone, seed=3, scale=0.1)
    return backbone
