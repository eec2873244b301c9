"""How the tokens of timm's models become a feature, and the ready configs of backbones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grappa_dist.config import BackboneConfig, Config, load
from grappa_dist.export import load_model, write_model
from grappa_dist.models import Backbone, Grappa, create_backbone
from grappa_dist.models.class_token_block import last_block
from grappa_dist.models.spec import ModelSpec, backbone_settings, build_backbone
from grappa_dist.models.trial import check_shapes, try_backbone
from tests.models import tiny
from tests.structure import ROOT
from tests.test_docs import DOCS, section

CONFIGS = sorted((ROOT / "configs" / "backbones").glob("*.yaml"))
DINOV3 = "timm:vit_small_patch16_dinov3"
SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32}
PAGE = DOCS["docs/backbones.md"]


def features(pool: str | None, name: str = DINOV3, seed: int = 0) -> tuple[Backbone, Tensor, Tensor]:
    """A small model, what it makes of two images, and its tokens."""
    backbone = create_backbone(name, SMALL, {}, pretrained=False, pool=pool)
    tiny.fill(backbone, seed)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    model: Any = backbone.model
    with torch.no_grad():
        return backbone, backbone(images), model.forward_features((images - backbone.mean) / backbone.std)


def test_dinov3_is_pooled_as_timm_does_it_unless_the_class_token_is_asked_for() -> None:
    for pool, expected in (
        (None, lambda tokens: tokens[:, 5:].mean(1)),  # a class token and four registers are left out
        ("avg", lambda tokens: tokens[:, 5:].mean(1)),
        ("token", lambda tokens: tokens[:, 0]),
    ):
        _, found, tokens = features(pool)
        torch.testing.assert_close(found, expected(tokens))


def test_another_pooling_leaves_the_trained_norm_where_it_is() -> None:
    backbone, found, tokens = features("avg", "timm:vit_tiny_patch16_224")
    torch.testing.assert_close(found, tokens[:, 1:].mean(1))
    plain = create_backbone("timm:vit_tiny_patch16_224", SMALL, {}, pretrained=False)
    assert backbone.state_dict().keys() == plain.state_dict().keys()  # so the same checkpoint fits


def test_the_last_block_is_computed_for_the_class_token_alone_where_that_is_pooled() -> None:
    assert last_block(features("token")[0])[1] == ""
    assert "pooled by 'avg'" in last_block(features(None)[0])[1]


@pytest.mark.parametrize(
    ("name", "pool", "words"),
    [
        ("timm:vit_base_patch16_siglip_224", "token", "has no such pooling: Token pooling needs the class token"),
        ("timm:vit_tiny_patch16_224", "map", "timm's is 'token'"),
        ("timm:deit_tiny_distilled_patch16_224", "avg", "timm:deit_tiny_distilled_patch16_224"),
        ("tests.models.tiny:create", "avg", "is for models of timm; tests.models.tiny:create pools"),
    ],
)
def test_a_pooling_that_a_model_has_not_is_refused(name: str, pool: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        create_backbone(name, SMALL if name.startswith("timm") else {}, {}, pretrained=False, pool=pool)
    assert str(caught.value).startswith(f"backbone.pool={pool}: ")


def test_a_model_that_does_not_do_what_is_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.pool", lambda self, x: x[:, 0])
    with pytest.raises(ValueError, match=r"backbone\.pool=avg: .* pools its tokens in a way of its own"):
        features("avg", "timm:vit_tiny_patch16_224")
    features("token", "timm:vit_tiny_patch16_224")


def test_the_pooling_is_part_of_the_fingerprint_only_where_it_is_given() -> None:
    plain = BackboneConfig(name=DINOV3)
    assert "pool" not in backbone_settings(plain)
    assert backbone_settings(plain.model_copy(update={"pool": "token"}))["pool"] == "token"


def test_the_start_of_a_run_and_an_exported_model_keep_the_pooling(tmp_path: Path) -> None:
    torch.save(tiny.timm_vit().state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig(
        name=tiny.TIMM, kwargs=tiny.TIMM_KWARGS, checkpoint=str(tmp_path / "weights.pth"), pool="avg"
    )
    try_backbone(config)
    write_model(ModelSpec("backbone", config), tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.normalize(build_backbone(config)(images), dim=1)
    torch.testing.assert_close(load_model(tmp_path)(images), expected)


def row(config: Config) -> list[str]:
    """The cells of a backbone in the table of the page."""
    table = section(PAGE, "Ready configs")
    (line,) = (line for line in table.splitlines() if f"`{config.backbone.name.removeprefix('timm:')}`" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_builds_its_backbone_and_what_the_page_says_of_it_is_so(path: Path) -> None:
    """All of it on the device meta, so without weights; with adaptors, one block of it."""
    import timm

    config = load(path)
    assert config.name == path.stem
    name = config.backbone.name.removeprefix("timm:")
    assert name in timm.list_pretrained()
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, pretrained=False)
        check_shapes(config.backbone, backbone)
    size = backbone.preprocess.image_size
    shallow = build_backbone(config.backbone.model_copy(update={"kwargs": {"depth": 1}}), pretrained=False)
    adapted = Grappa(shallow, 2, 8, attention=True)
    assert adapted(torch.zeros(1, 3, size, size)).shape == (1, backbone.embed_dim)
    model: Any = backbone.model
    assert model.global_pool == config.backbone.pool
    given, pixels = timm.get_pretrained_cfg(name), backbone.preprocess
    assert (pixels.mean, pixels.std, pixels.interpolation) == (given.mean, given.std, given.interpolation)
    plain = timm.create_model(name.partition(".")[0], num_classes=0, device="meta")
    tokens = (size // model.patch_embed.patch_size[0]) ** 2 + model.num_prefix_tokens
    millions = sum(p.numel() for p in plain.parameters()) / 1e6
    assert row(config) == [
        f"[`{path.stem}`](../configs/backbones/{path.name})",
        f"`{name}`",
        f"{millions:.1f} M",
        str(backbone.embed_dim),
        f"{size} px, {tokens}",
        f"`{config.backbone.pool}`" + (f" (timm: `{plain.global_pool}`)" * (plain.global_pool != model.global_pool)),
        "ImageNet's" if given.mean == (0.485, 0.456, 0.406) else "0.5, 0.5",
        given.license,
    ]


def test_every_backbone_of_the_page_has_a_config() -> None:
    named = re.findall(r"\(\.\./configs/backbones/(\w+\.yaml)", section(PAGE, "Ready configs"))
    assert sorted(named) == [path.name for path in CONFIGS]
