"""Files of weights that people have: what is read, and what is said of the others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from grappa_dist.models import create_backbone
from grappa_dist.models.weights import load_tensors, tensors_of
from tests.models import odd, tiny

OWN = "tests.models.tiny:create"
State = dict[str, Tensor]


def state(name: str) -> State:
    model = tiny.timm_vit(seed=1) if name == tiny.TIMM else tiny.create()
    return dict(model.state_dict())


def loaded(name: str, path: Path) -> nn.Module:
    kwargs = tiny.TIMM_KWARGS if name == tiny.TIMM else {}
    return create_backbone(name, kwargs, {}, checkpoint=str(path)).model


def refusal(name: str, path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(f"backbone.checkpoint='{path}' ")) as caught:
        loaded(name, path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "")


def under(prefix: str) -> Callable[[State], Mapping[str, Any]]:
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def pretext(tensors: State) -> Mapping[str, Any]:
    return {"teacher": under("backbone.")(tensors), "student": {}, "epoch": 3}


FOREIGN: dict[str, tuple[Callable[[State], Mapping[str, Any]], str]] = {
    "a teacher": (pretext, "its names begin with 'teacher/backbone.'; save the tensors in 'teacher' to a file"),
    "lightning": (
        lambda tensors: {"state_dict": under("model.")(tensors)},
        "'state_dict/model.'; save the tensors in 'state_dict' to a file of their own, without 'model.' in front",
    ),
    "a part": (under("encoder.vit."), "its names begin with 'encoder.vit.'; save its tensors to a file of their own"),
    "another model": (
        lambda _: {"layer1.0.conv1.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(2)},
        "it has layer1.0.conv1.weight, fc.bias, which the backbone has not",
    ),
}


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_other_names_is_refused_with_those_found_and_those_expected(
    kind: str, name: str, tmp_path: Path
) -> None:
    make, words = FOREIGN[kind]
    torch.save(make(state(name)), tmp_path / "w.pth")
    message = refusal(name, tmp_path / "w.pth")
    assert words in message
    if name == tiny.TIMM or kind in ("a part", "another model"):
        assert re.search(r"it has no (cls_token|[\w.]+weight)", message)


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "deeper": ({"depth": 13}, "it has 13 blocks, the backbone 12; it has blocks.12.norm1.weight, blocks.12.norm1.bias"),
    "shallower": ({"depth": 1}, "it has 1 block, the backbone 12; it has no blocks.1.norm1.weight"),
    "wider": ({"embed_dim": 48}, "cls_token is (1, 1, 48), expected (1, 1, 24)"),
    "patches": ({"patch_size": 8}, "patch_embed.proj.weight is (24, 3, 8, 8), expected (24, 3, 16, 16)"),
    "layer scale": ({"init_values": 1e-5}, "it has blocks.0.ls1.gamma, blocks.0.ls2.gamma"),
    "norms of q and k": ({"qk_norm": True}, "it has blocks.0.attn.q_norm.weight"),
    "no biases": ({"qkv_bias": False}, "it has no blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias, blocks.2.attn"),
    "norm before": ({"pre_norm": True}, "it has norm_pre.weight, norm_pre.bias, which the backbone has not"),
    "registers": ({"reg_tokens": 4, "no_embed_class": True}, "it has reg_token, which the backbone has not"),
    "mean of tokens": ({"class_token": False, "global_pool": "avg"}, "it has no cls_token, norm.weight"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_weights_of_another_architecture_are_refused_though_timm_takes_them(kind: str, tmp_path: Path) -> None:
    changed, words = OTHER_MODELS[kind]
    kwargs = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "no_embed_class": changed.get("no_embed_class", False)}
    torch.save(tiny.timm_vit(**{**kwargs, **changed}).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape(words)):
        create_backbone(tiny.TIMM, kwargs, {}, checkpoint=str(tmp_path / "w.pth"))
    assert "load_state_dict" not in vars(type(tiny.timm_vit()))


def test_a_depth_that_is_asked_for_takes_the_first_blocks_of_a_deeper_model(tmp_path: Path) -> None:
    torch.save(tiny.timm_vit(**{**tiny.TIMM_KWARGS, "depth": 4}).state_dict(), tmp_path / "w.pth")
    found = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=str(tmp_path / "w.pth"))
    assert len(found.blocks) == 2
    assert "has blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight and 21 more" in found.remarks[0]


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
@pytest.mark.parametrize("kind", ["norm.", "bias"])
def test_a_part_of_the_weights_is_refused_also_where_all_of_it_is_ones_or_zeros(
    name: str, kind: str, tmp_path: Path
) -> None:
    torch.save({key: t for key, t in state(name).items() if kind not in key}, tmp_path / "w.pth")
    assert re.search(r"it has no [\w., ]*(norm|bias)", refusal(name, tmp_path / "w.pth"))


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_integers_are_no_weights(name: str, tmp_path: Path) -> None:
    torch.save({key: (100 * t).to(torch.int8) for key, t in state(name).items()}, tmp_path / "w.pth")
    assert "torch.int8, expected torch.float32 or another floating point type" in refusal(name, tmp_path / "w.pth")


def test_what_a_training_has_beside_the_backbone_and_other_sizes_of_images_are_remarked(tmp_path: Path) -> None:
    tensors = tiny.timm_vit(**{**tiny.TIMM_KWARGS, "img_size": 64}).state_dict()
    torch.save({**tensors, "decoder.weight": torch.ones(2), "head.mlp.weight": torch.ones(2)}, tmp_path / "w.pth")
    beside, sizes = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=str(tmp_path / "w.pth")).remarks
    assert beside.endswith(" has decoder.weight, head.mlp.weight, which the backbone has not: not used")
    assert "pos_embed is (1, 17, 24), here (1, 5, 24)" in sizes


def test_weights_that_timm_has_for_a_model_are_refused_for_one_of_other_kwargs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parts that they lack would be random, without a word."""
    of_hub = tiny.timm_vit().state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(of_hub))
    monkeypatch.setattr("grappa_dist.models.backbone.check_weights", lambda name: None)
    assert torch.equal(create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}).model.norm.weight, of_hub["norm.weight"])
    with pytest.raises(ValueError, match=r"^the weights of backbone\.name=timm:\S+ do not fit the backbone: it has 2 "):
        create_backbone(tiny.TIMM, {**tiny.TIMM_KWARGS, "depth": 3}, {})


@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_that_was_saved_after_the_seed_that_is_used_here_is_read(seed: int, tmp_path: Path) -> None:
    tiny.timm_vit()
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(tiny.TIMM.removeprefix("timm:"), num_classes=0, **tiny.TIMM_KWARGS)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = loaded(tiny.TIMM, tmp_path / "w.pth").state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_a_tensor_of_another_shape_is_named_with_both(name: str, tmp_path: Path) -> None:
    tensors = state(name)
    tensors["norm.weight"] = torch.zeros(5)
    torch.save(tensors, tmp_path / "w.pth")
    assert f"norm.weight is (5,), expected ({24 if name == tiny.TIMM else 8},)" in refusal(name, tmp_path / "w.pth")


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_what_timm_reads_is_read_with_the_options_of_a_training_beside_it(wrap: str, tmp_path: Path) -> None:
    tensors = state(tiny.TIMM)
    torch.save({wrap: under("module.")(tensors), "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "w.pth")
    found = loaded(tiny.TIMM, tmp_path / "w.pth").state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_a_file_is_read_by_its_content_and_not_by_the_end_of_its_name(name: str, tmp_path: Path) -> None:
    tensors = state(name)
    save_file(tensors, tmp_path / "w.pth")
    torch.save(tensors, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        assert torch.equal(loaded(name, path).state_dict()["norm.weight"], tensors["norm.weight"])


NO_WEIGHTS = {
    b"": "it is empty",
    b"\n<!DOCTYPE html><html>Sign in</html>": "it is a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12": "a pointer of Git LFS",
    bytes(4096): "it begins with zeros",
    b'{"error": "not found"}': "it is JSON",
    b"\x93NUMPY\x01\x00": "it is a file of NumPy",
    save({"a": torch.zeros(100)})[:-9]: "cannot be read as weights: expected an undamaged",
    b"PK\x03\x04 and no more": "cannot be read as weights: expected an undamaged",
}


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
@pytest.mark.parametrize("content", NO_WEIGHTS, ids=list(NO_WEIGHTS.values()))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named_as_what_it_is(
    content: bytes, suffix: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert NO_WEIGHTS[content] in refusal(name, tmp_path / f"w{suffix}")


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"epoch": 3}], ids=str)
def test_a_file_without_named_tensors_is_refused(content: object, name: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    refusal(name, tmp_path / "w.pth")


def test_weights_of_half_precision_come_as_they_are(tmp_path: Path) -> None:
    """Into a module that a function returns in half precision as well: it is made float32 before."""
    tensors = {key: tensor * 1.0001 for key, tensor in tiny.create().state_dict().items()}
    torch.save(tensors, tmp_path / "w.pth")
    model = create_backbone(
        "tests.models.odd:of_type", {"name": "bfloat16"}, {}, checkpoint=str(tmp_path / "w.pth")
    ).model
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


def test_a_state_of_tied_strided_and_empty_tensors_goes_to_a_file_and_back() -> None:
    model = odd.tied()
    stored = tensors_of(model)
    assert "blocks.0.norm1.weight" in stored
    assert "blocks.2.norm1.weight" not in stored
    save(stored)  # which refuses shared memory
    other = odd.tied()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert load_tensors(other, stored) == ([], [])
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    del stored["blocks.0.norm1.weight"]
    missing, _ = load_tensors(other, stored)
    assert missing == [f"blocks.{i}.norm1.weight" for i in range(3)]


def test_arguments_that_would_read_other_files_are_not_for_timm() -> None:
    for key in ("checkpoint_path", "pretrained_cfg_overlay", "pretrained"):
        with pytest.raises(ValueError, match=f"backbone.kwargs has {key}, which is set here; weights are named by"):
            create_backbone(tiny.TIMM, {key: "/x"}, {}, pretrained=False)
