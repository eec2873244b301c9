"""A model with the methods of timm's vision transformers, for code that was written for these.

Shapes: B images, S pixels a side, T tokens, P patches, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from grappa_dist.export import Transform
from grappa_dist.models import Backbone, Grappa
from grappa_dist.retrieval.opening import Named, open_model


class FeatureExtractor(nn.Module):
    """The adapted ViT as timm has one with `num_classes=0`: normalised images to tokens or pooled features; frozen.

    `forward` and `forward_head` give features as the method has them, before they are scaled to unit length, as search
    compares them: `torch.nn.functional.normalize(features)` is what `load_model` gives. `pretrained_cfg` has the size,
    mean and std for `timm.data`; `transform` is the exact test transform.

    Args:
        model: as for `ImageEmbedder`; one in memory is used where it is.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<number>".
        gallery: of a model of the variant `gallery`, the task whose weights of the sets are used.
        settings: `backbone.key=value`, for a backbone that is named.
        trust_modules: as for `load_model`.

    Raises:
        ValueError: there is no such model or device.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Named,
        device: str = "cpu",
        *,
        gallery: str | None = None,
        settings: Iterable[str] = (),
        trust_modules: bool | None = None,
    ) -> None:
        super().__init__()
        opened = open_model(model, device, gallery=gallery, settings=settings, trust_modules=trust_modules)
        if isinstance(opened.model, Grappa):
            opened.model.fold()
        backbone = opened.model.backbone if isinstance(opened.model, Grappa) else opened.model
        assert isinstance(backbone, Backbone)
        self.is_timms, preprocess = backbone.is_timms, backbone.preprocess
        self.model: Any = backbone.model.requires_grad_(False).eval()  # with the adaptors behind its blocks
        self.num_features = self.embed_dim = self.head_hidden_size = backbone.embed_dim
        self.num_classes, self.num_prefix_tokens = 0, int(getattr(self.model, "num_prefix_tokens", 1))
        self.pretrained_cfg = {
            "input_size": (3, preprocess.image_size, preprocess.image_size),
            "interpolation": preprocess.interpolation,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "crop_pct": preprocess.crop_share,
            "crop_mode": "squash" if preprocess.resize == "squash" else "center",
        }
        self._to_pixels = Transform(preprocess)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in eval mode, as every model here is frozen."""
        return super().train(False)

    def transform(self, image: Image.Image) -> Tensor:
        """The test transform of an image of any size and mode: normalised pixels (3, S, S), on the CPU."""
        return (self._to_pixels(image) - self.mean.cpu()) / self.std.cpu()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> all tokens behind the last norm (B, T, D); prefix tokens come first."""
        if self.is_timms:
            features: Tensor = self.model.forward_features(x)
            return features
        tokens = self.model.patch_embed(x)
        for block in self.model.blocks:
            tokens = block(tokens)
        normed: Tensor = self.model.norm(tokens)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` (B, T, D) -> the features of the images (B, D), pooled as the model has it.

        Args:
            pre_logits: as in timm; there is no classifier, so it changes nothing.
        """
        if not self.is_timms:
            return x[:, 0]
        pooled: Tensor = self.model.forward_head(x, pre_logits=True)
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, D)."""
        return self.forward_head(self.forward_features(x))

    def patch_tokens(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> the tokens of the patches (B, P, D), row by row."""
        return self.forward_features(x)[:, self.num_prefix_tokens :]

    def forward_intermediates(self, x: Tensor, **how: Any) -> Any:
        """What several blocks give, adaptors included, by timm's own method and with its arguments.

        Raises:
            ValueError: the backbone is no model of timm's that has it.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"forward_intermediates: {type(self.model).__name__} is no model of timm's that has it")
        return self.model.forward_intermediates(x, **how)
