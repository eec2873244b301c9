"""What a backbone is said to be is tried."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.config import BackboneConfig
from grappa_dist.models import trial
from grappa_dist.models.spec import build_backbone
from grappa_dist.models.trial import describe_difference, try_backbone, verdict_of, weights_of
from tests.models import tiny


def odd(function: str, **kwargs: Any) -> BackboneConfig:
    return BackboneConfig(name=f"tests.models.odd:{function}", kwargs=kwargs, image_size=32)


REFUSED = {
    "its own forward the blocks get tokens that patch_embed does not make: (2, 17, 8), and from patch_embed (2, 16,": [
        odd("seeded", kind="dino"),
        odd("seeded", kind="dinov2"),
        odd("seeded", kind="classifier"),
    ],
    "cls_token, pos_embed of the module itself change no feature": [odd("seeded", kind="hub")],
    "token 0 behind norm is not what its own forward returns (mean cosine ": [odd("seeded", kind="mean")],
    "the same image has other features at each pass": [odd("with_block", name="dropout")],
    "an image has other features alone than beside another one": [odd("with_block", name="batch")],
    "blocks[1] makes a tuple, expected tokens (B, T, embed_dim)": [odd("with_block", name="tuple")],
    "blocks[1] makes (2, 8), expected tokens (B, T, embed_dim)": [odd("with_block", name="sum")],
    "raises KeyError: 'no such thing'": [odd("with_block", name="raises"), odd("with_norm", name="raises")],
    "does not go through blocks[0], or lets no gradient through": [
        odd("with_block", name="detached"),
        odd("elsewhere"),
    ],
    "features are torch.bfloat16, expected torch.float32": [odd("with_norm", name="bf16")],
    "each call makes other weights": [odd("unseeded"), odd("by_numpy"), odd("hidden", buffer=True)],
    "exported and loaded again, the model has other features": [odd("hidden", buffer=False)],
    "a forward pass changes its buffers": [odd("counting")],
    "weights are not finite (NaN or infinite): norm.weight": [
        odd("filled", value=float("nan")),
        odd("filled", value=float("inf")),
    ],
    "features of images of noise are not finite (NaN or infinite); its buffer norm.1.scale is NaN": [
        odd("with_nan_buffer")
    ],
    "features of images of noise are not finite (NaN or infinite), though": [
        odd("filled", value=3e38, name="patch_embed.linear.weight")
    ],
    "norm._extra_state in its state_dict is a dict": [odd("extra_state")],
    "extra.weight has no values yet": [odd("lazy")],
    "has no values yet (a lazy module, or one on the device meta)": [odd("on_meta")],
    "raises() raised TypeError: a fault inside (": [odd("raises")],
    "exits() raised SystemExit: 3": [odd("exits")],
    "pair returned a tuple, expected a torch.nn.Module": [odd("pair")],
    "'NUMBER' is of type int, expected a function": [odd("NUMBER")],
    "OwnVit.blocks is a list, expected a ModuleList or Sequential": [odd("with_part", name="blocks", kind="list")],
    "OwnVit.blocks is an empty ModuleList": [odd("with_part", name="blocks", kind="empty")],
    "OwnVit.embed_dim is (8, 8), expected the number of channels": [odd("with_part", name="embed_dim", kind="pair")],
    "OwnVit.embed_dim is '8', expected": [odd("with_part", name="embed_dim", kind="text")],
    "OwnVit.norm is a NoneType, expected one module to call": [odd("with_part", name="norm", kind="none")],
    "OwnVit.patch_embed is a ModuleList, expected one": [odd("with_part", name="patch_embed", kind="empty")],
}


@pytest.mark.parametrize(
    ("words", "config"),
    [(words, config) for words, configs in REFUSED.items() for config in configs],
    ids=lambda value: "" if isinstance(value, str) else f"{value.name.partition(':')[2]} {value.kwargs}",
)
def test_what_cannot_be_used_is_refused_and_said_why(words: str, config: BackboneConfig) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        try_backbone(config)
    assert "backbone" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        odd("wrapped"),
        odd("seeded", kind="same"),
        odd("hub_with_tokens"),
        odd("tied"),
        odd("with_buffers"),
        odd("of_type", name="bfloat16"),
        odd("of_type", name="float16"),
        odd("of_type", name="float64"),
        odd("frozen_patches"),
        odd("method"),
        BackboneConfig(name="tests.models.tiny:create", image_size=32),
        BackboneConfig(name="grappa_dist.demo.backbone:create"),
    ],
    ids=lambda config: f"{config.name.partition(':')[2]} {config.kwargs}",
)
def test_what_can_be_used_passes_without_a_word(config: BackboneConfig) -> None:
    verdict = try_backbone(config)
    mask = [warning for warning in verdict.warnings if "mask_token" not in warning]
    assert mask == []
    assert verdict.weights == weights_of(build_backbone(config))


def test_parameters_that_change_nothing_and_features_that_are_alike_are_warned_of() -> None:
    (warning,) = try_backbone(odd("with_head")).warnings
    assert "1 of its parameters change no feature: head.weight" in warning
    (warning,) = [text for text in try_backbone(odd("constant")).warnings if "alike" in text]
    assert warning.startswith("backbone.name=tests.models.odd:constant: two images of noise have features that are all")
    (warning,) = try_backbone(odd("seeded", kind="methods")).warnings
    assert "1 of its parameters change no feature: mask_token" in warning


def test_a_trial_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="each call makes other weights"):
        try_backbone(odd("unseeded"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_backbone_of_other_weights_elsewhere_is_told_apart_by_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = odd("by_process")
    expected = try_backbone(config).weights
    assert describe_difference(config, expected) == ""
    monkeypatch.setattr("os.getpid", lambda: 3)
    why = describe_difference(config, expected)
    assert why.startswith(
        "the backbone is built with other weights than on the driver: model.patch_embed.linear.weight;"
    )
    why = describe_difference(odd("wrapped", dim=4), expected)
    assert "model.blocks.0.linear1.bias, model.blocks.0.linear1.weight" in why
    assert describe_difference(odd("raises"), expected).startswith("the backbone cannot be built: backbone.name=tests.")


def test_last_bits_of_another_cpu_are_no_other_weights() -> None:
    backbone = build_backbone(odd("wrapped"))
    expected = weights_of(backbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1 + 1e-7)
    assert weights_of(backbone).digest != expected.digest
    assert trial._difference(weights_of(backbone), expected) == ""


def test_a_verdict_that_took_long_is_read_again_until_the_backbone_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "KEPT_FROM_S", 1e9)
    verdict_of(odd("with_head"), tmp_path / "index")
    monkeypatch.setattr(trial, "KEPT_FROM_S", 0.0)
    verdict_of(odd("with_head"), tmp_path / "index", keep=False)
    assert not (tmp_path / "index").exists()
    first = verdict_of(odd("with_head"), tmp_path / "index")
    monkeypatch.setattr(trial, "try_backbone", lambda config: pytest.fail("tried again"))
    assert verdict_of(odd("with_head"), tmp_path / "index") == first
    for damage in ("{", "[]", '{"of": 3}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / trial.VERDICT_FILE).write_text(damage)
        with pytest.raises(pytest.fail.Exception, match="tried again"):
            verdict_of(odd("with_head"), tmp_path / "other")
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        verdict_of(odd("with_head").model_copy(update={"image_size": 16}), tmp_path / "index")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "xcit_nano_12_p16_224"])
def test_models_of_timm_pass_with_a_checkpoint(name: str, tmp_path: Path) -> None:
    kwargs = tiny.TIMM_KWARGS if name.startswith("vit") else {"img_size": 32, "embed_dim": 24, "depth": 1}
    model = tiny.timm_vit(name, **kwargs)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig(name=f"timm:{name}", kwargs=kwargs, checkpoint=str(tmp_path / "weights.pth"))
    assert try_backbone(config).warnings == ()


def test_not_a_number_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    model = tiny.timm_vit()
    with torch.no_grad():
        dict(model.named_parameters())["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig(name=tiny.TIMM, kwargs=tiny.TIMM_KWARGS, checkpoint=str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match=r"weights are not finite \(NaN or infinite\): blocks\.0\.mlp\.fc1\.weight"):
        try_backbone(config)
