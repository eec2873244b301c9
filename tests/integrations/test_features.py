from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from grappa_dist import load_model
from grappa_dist.integrations import features
from grappa_dist.models import create_backbone
from tests.models import tiny
from tests.stages.tiny import picture
from tests.test_export import exported, images

FeatureExtractor = features.FeatureExtractor


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    exported(folder)
    return folder


def normalised(vit: features.FeatureExtractor, pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - vit.mean) / vit.std


def test_its_features_are_those_of_load_model_before_they_have_unit_length(run: Path) -> None:
    vit, model = FeatureExtractor(run), load_model(run)
    x = normalised(vit, images(3))
    tokens = vit.forward_features(x)
    assert tokens.shape == (3, 1 + 4, vit.num_features)  # a class token, and 2 x 2 patches of 16 pixels
    torch.testing.assert_close(vit.forward_head(tokens, pre_logits=True), tokens[:, 0])
    torch.testing.assert_close(vit(x), tokens[:, 0])
    torch.testing.assert_close(vit.patch_tokens(x), tokens[:, 1:])
    torch.testing.assert_close(F.normalize(vit(x)), model(images(3)))
    assert not vit(x).requires_grad
    assert not vit.train().training


def test_patch_tokens_and_intermediates_have_the_adaptors_in_them(run: Path) -> None:
    vit, model = FeatureExtractor(run), load_model(run)
    plain = model.grappa.backbone.model
    x = normalised(vit, images(2))
    final, maps = vit.forward_intermediates(x, indices=2)
    assert [tuple(one.shape) for one in maps] == [(2, vit.embed_dim, 2, 2)] * 2
    torch.testing.assert_close(final, vit.forward_features(x))
    for layer in plain.blocks:
        layer.adaptors.up_weight.data.zero_()
        layer.adaptors.up_bias.data.zero_()
    bare = FeatureExtractor(model)
    assert (bare.patch_tokens(x) - vit.patch_tokens(x)).abs().max() > 1e-3


def test_its_transform_and_config_are_those_of_the_model(run: Path) -> None:
    from timm.data import create_transform, resolve_model_data_config

    vit, model = FeatureExtractor(run), load_model(run)
    (run / "photo.png").write_bytes(picture(0))
    photo = Image.open(run / "photo.png")
    torch.testing.assert_close(vit.transform(photo), normalised(vit, model.transform(photo)))
    found = resolve_model_data_config(vit)
    assert found["input_size"] == (3, 32, 32)
    assert (found["mean"], found["std"]) == (model.transform.preprocess.mean, model.transform.preprocess.std)
    by_timm = create_transform(**found)(photo.convert("RGB"))
    assert by_timm.shape == vit.transform(photo).shape
    assert (by_timm - vit.transform(photo)).abs().mean() < 0.02  # edges of crops are rounded otherwise
    assert (vit.num_classes, vit.num_prefix_tokens, vit.embed_dim) == (0, 1, 24)


def test_any_model_may_be_named_or_given() -> None:
    own = FeatureExtractor("tests.models.tiny:create", settings=["backbone.image_size=32"])
    x = torch.rand(2, 3, 32, 32)
    backbone = create_backbone("tests.models.tiny:create", {}, {"image_size": 32})
    torch.testing.assert_close(own(x), backbone(x * backbone.std + backbone.mean))
    assert own.forward_features(x).shape == (2, 16, 8)
    with pytest.raises(ValueError, match="forward_intermediates: OwnVit is no model of timm's"):
        own.forward_intermediates(x)
    kwargs: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32}
    registers = create_backbone("timm:vit_small_patch16_dinov3", kwargs, {}, pretrained=False, pool="token")
    tiny.fill(registers, 0)
    vit = FeatureExtractor(registers)
    tokens = vit.forward_features(x)
    assert vit.num_prefix_tokens == 5
    torch.testing.assert_close(vit(x), tokens[:, 0])
    assert vit.patch_tokens(x).shape == (2, 4, 24)
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        FeatureExtractor("nowhere")
