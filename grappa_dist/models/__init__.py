"""The frozen backbone, adaptor sets, and the Grappa layer that fuses them."""

from grappa_dist.models.adaptors import Adaptors
from grappa_dist.models.backbone import Backbone, Pixels, create_backbone
from grappa_dist.models.grappa import Attention, Grappa, GrappaLayer
from grappa_dist.models.packed import PackedGrappa
from grappa_dist.models.projector import Projector
from grappa_dist.models.sizes import check_image_size

__all__ = [
    "Adaptors",
    "Attention",
    "Backbone",
    "Grappa",
    "GrappaLayer",
    "PackedGrappa",
    "Pixels",
    "Projector",
    "check_image_size",
    "create_backbone",
]
