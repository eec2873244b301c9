"""The frozen backbone, adaptor sets, and the Grappa layer that fuses them."""

from grappa_dist.models.backbone import Backbone, check_image_size, create_backbone
from grappa_dist.models.grappa import Adaptors, Attention, Grappa, GrappaLayer
from grappa_dist.models.packed import PackedGrappa

__all__ = [
    "Adaptors",
    "Attention",
    "Backbone",
    "Grappa",
    "GrappaLayer",
    "PackedGrappa",
    "check_image_size",
    "create_backbone",
]
