"""What a plan knows of the backbone before it is built: all of a timm model, its weights aside, little of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from grappa_dist.artifacts import Artifact
from grappa_dist.config import BackboneConfig
from grappa_dist.models import Backbone
from grappa_dist.models.spec import build_backbone
from grappa_dist.stages.embed import ROWS_FILE


def without_weights(config: BackboneConfig) -> Backbone | None:
    """A timm model without weights, and without memory for them; None of one's own, which is not built for a plan.

    Raises:
        ValueError: the model does not take images of that size.
    """
    if not config.name.startswith("timm:"):
        return None
    with torch.device("meta"):
        return build_backbone(config, pretrained=False)


def backbone_in_words(config: BackboneConfig, model: Backbone | None) -> Iterator[str]:
    """Channels, and how an image gets in, with what the settings leave to timm."""
    if model is not None:
        pixels = model.pixels
        yield (
            f"{config.name}: {model.embed_dim} channels; image_size={pixels.image_size}, resize={pixels.resize}, "
            f"interpolation={pixels.interpolation}"
        )


def known_width(model: Backbone | None, features: Sequence[Artifact]) -> int | None:
    """Channels of the backbone: those of the model, else those of features that are there, else None."""
    if model is not None:
        return model.embed_dim
    done = next((artifact for artifact in features if artifact.complete), None)
    return None if done is None else int(np.load(done.path / ROWS_FILE, mmap_mode="r").shape[1])
