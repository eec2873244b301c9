from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.models import create_backbone
from grappa_dist.models.backbone import check_image_size
from tests.models import tiny

NAME = "tests.models.test_backbone_sizes:positioned"


class Positioned(tiny.Patches):
    """Patches of 8 pixels with a class token and as many positions as an image of that side has."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__(dim)
        self.positions = nn.Parameter(torch.ones(1, (side // 8) ** 2 + 1, dim))

    def forward(self, images: Tensor) -> Tensor:
        tokens = super().forward(images)
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1) + self.positions


def positioned(image_size: int = 48) -> nn.Module:
    model = tiny.OwnVit()
    model.patch_embed = Positioned(model.embed_dim, image_size)
    return model


def channels_last() -> nn.Module:
    model = tiny.OwnVit()
    model.patch_embed = nn.Conv2d(3, model.embed_dim, 8, stride=8)  # type: ignore[assignment]
    return model


def of_four_channels() -> nn.Module:
    model = tiny.OwnVit()
    model.patch_embed = nn.Conv2d(4, model.embed_dim, 8, stride=8)  # type: ignore[assignment]
    return model


def check(name: str, size: int, **kwargs: Any) -> None:
    check_image_size(create_backbone(name, kwargs, {"image_size": size}, pretrained=False), name, kwargs)


def test_a_size_that_the_positions_are_not_made_for_is_refused_with_the_one_that_is() -> None:
    check(NAME, 48, image_size=48)
    right = r"^backbone\.image_size=64 does not suit backbone\.name=tests\.models\.test_backbone_sizes:positioned: "
    with pytest.raises(
        ValueError, match=right + r"it takes backbone\.image_size=48, or kwargs that make it for 64 \(The"
    ):
        check(NAME, 64, image_size=48)
    message = (
        r"positioned: patch_embed fails on an image of backbone\.image_size=64 \(The.*\); give the side that the model"
    )
    with pytest.raises(ValueError, match=message):
        check(NAME, 64)


def test_pixels_that_no_patch_reaches_are_not_dropped_silently() -> None:
    message = (
        r"patches do not reach the last 4 of 52 pixels; give a multiple of the patch, such as backbone.image_size=48$"
    )
    with pytest.raises(ValueError, match=message):
        check(NAME, 52, image_size=52)
    check(NAME, 56, image_size=56)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_of_timm_is_checked_with_and_without_weights(device: str) -> None:
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 3}

    def of(size: int, **more: Any) -> None:
        with torch.device(device):
            check(tiny.TIMM, size, **kwargs, **more)

    of(64)
    with pytest.raises(ValueError, match=r"do not reach the last 4 of 36 pixels; .* such as backbone\.image_size=32$"):
        of(36)
    with pytest.raises(ValueError, match=r"^backbone\.image_size=48 .*: it takes backbone\.image_size=32, or kwargs"):
        of(48, img_size=32)


def test_patches_that_come_with_the_shape_of_their_grid_are_checked_by_their_tokens() -> None:
    check("timm:xcit_nano_12_p16_224", 32)


def test_patches_that_fail_at_any_size_are_no_matter_of_the_size() -> None:
    with pytest.raises(ValueError, match=r"patch_embed fails on an image of backbone\.image_size=48 \(.*channels"):
        check("tests.models.test_backbone_sizes:of_four_channels", 48)


def test_patches_that_are_no_tokens_are_refused_by_their_shape() -> None:
    message = r"patch_embed must make tokens \(B, T, embed_dim\) of images, here \(1, T, 8\); it makes \(1, 8, 4, 4\)$"
    with pytest.raises(ValueError, match=message):
        check("tests.models.test_backbone_sizes:channels_last", 32)
