from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from grappa_dist.config import BackboneConfig
from grappa_dist.data.transforms import Preprocess
from grappa_dist.models import Backbone, check_image_size, create_backbone
from grappa_dist.models.spec import build_backbone
from grappa_dist.models.trial import try_backbone
from tests.models import odd, tiny

OWN = "tests.models.tiny:create"


def saved(model: nn.Module, path: Path) -> str:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def refused(words: str, name: str, kwargs: dict[str, Any] | None = None, **options: Any) -> str:
    """Is refused in one line that has the words, and returned."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        create_backbone(name, kwargs or {}, {}, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_timm_model_is_refused_with_names_near_it() -> None:
    refused("backbone.name=timm:vit_tiny_patch16_225: timm", "timm:vit_tiny_patch16_225", pretrained=False)
    refused("no such model; did you mean 'vit_tiny_patch16_224'", "timm:vit_tiny_patch16_225", pretrained=False)


def test_unknown_weights_of_a_known_timm_model_are_refused() -> None:
    for pretrained in (True, False):
        refused("backbone.name=timm:vit_tiny_patch16_224.moon", "timm:vit_tiny_patch16_224.moon", pretrained=pretrained)


def test_an_unknown_module_or_function_is_refused() -> None:
    refused("backbone.name=no_such_module:create: No module named", "no_such_module:create")
    refused(
        "backbone.name=tests.models.tiny:creat: the module tests.models.tiny has no 'creat'", "tests.models.tiny:creat"
    )


def test_what_is_no_vit_is_refused_naming_what_it_lacks() -> None:
    refused("backbone.name: Linear has no patch_embed, blocks, norm, embed_dim", "tests.models.tiny:no_vit")
    refused("backbone.name: ResNet has no patch_embed", "timm:resnet18", pretrained=False)


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_wrong_kwargs_are_refused(name: str) -> None:
    refused("backbone.kwargs={'heads': 3}", name, {"heads": 3}, pretrained=False)


def test_kwargs_that_do_not_go_together_are_refused() -> None:
    refused("backbone.kwargs=", tiny.TIMM, {"embed_dim": 10, "num_heads": 3}, pretrained=False)


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_a_missing_checkpoint_is_refused_unless_weights_follow_later(name: str) -> None:
    kwargs = tiny.TIMM_KWARGS if name == tiny.TIMM else {}
    refused("backbone.checkpoint='nowhere.safetensors' does not exist", name, kwargs, checkpoint="nowhere.safetensors")
    create_backbone(name, kwargs, {}, checkpoint="nowhere.safetensors", pretrained=False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_a_file_of_something_else_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"hello, these are no weights")
    kwargs = tiny.TIMM_KWARGS if name == tiny.TIMM else {}
    words = (
        f"backbone.checkpoint='{path}' cannot be read as weights: expected an undamaged .safetensors file, or a PyTorch"
    )
    assert "weights_only" not in refused(words, name, kwargs, checkpoint=str(path))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", [tiny.TIMM, OWN])
def test_a_checkpoint_that_would_run_code_runs_none(name: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "it ran"
    torch.save({"state_dict": Hostile(marker)}, path)
    kwargs = tiny.TIMM_KWARGS if name == tiny.TIMM else {}
    refused(f"backbone.checkpoint='{path}' cannot be read as weights", name, kwargs, checkpoint=str(path))
    assert not marker.exists()


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"embed_dim": 12}])
def test_weights_of_another_timm_model_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    """timm itself passes over missing weights where it drops a classifier, and leaves a random block."""
    kwargs = {**tiny.TIMM_KWARGS, **wrong}
    path = saved(tiny.timm_vit(**kwargs), tmp_path / "other.safetensors")
    refused(f"backbone.checkpoint='{path}' does not fit", tiny.TIMM, tiny.TIMM_KWARGS, checkpoint=path)


def test_weights_of_another_module_are_refused(tmp_path: Path) -> None:
    path = saved(tiny.create(depth=2), tmp_path / "other.safetensors")
    refused(f"backbone.checkpoint='{path}' does not fit", OWN, checkpoint=path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_is_loaded_bitwise(suffix: str, tmp_path: Path) -> None:
    vit, own = tiny.timm_vit(seed=3), tiny.create()
    tiny.fill(own, seed=4)
    found = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=saved(vit, tmp_path / f"vit{suffix}"))
    assert all(torch.equal(t, found.model.state_dict()[name]) for name, t in vit.state_dict().items())
    found = create_backbone(OWN, {}, {}, checkpoint=saved(own, tmp_path / f"own{suffix}"))
    assert all(torch.equal(t, found.model.state_dict()[name]) for name, t in own.state_dict().items())


def test_a_checkpoint_of_timm_loads_with_its_classifier_and_at_another_image_size(tmp_path: Path) -> None:
    tiny.timm_vit()
    import timm

    classifier = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **tiny.TIMM_KWARGS)
    tiny.fill(classifier, seed=2)
    path = saved(classifier, tmp_path / "classifier.safetensors")
    found = create_backbone(tiny.TIMM, {**tiny.TIMM_KWARGS, "img_size": 64}, {}, checkpoint=path)
    weight = "blocks.1.mlp.fc2.weight"
    assert torch.equal(found.model.state_dict()[weight], classifier.state_dict()[weight])
    assert found(torch.rand(1, 3, 64, 64)).shape == (1, 24)


def test_loading_a_checkpoint_leaves_the_generator_alone(tmp_path: Path) -> None:
    path = saved(tiny.timm_vit(), tmp_path / "vit.safetensors")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_cannot_be_had_offline_are_refused_at_once_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def urlopen(request: urllib.request.Request, timeout: float) -> None:
        asked.append((request.full_url, timeout))
        raise urllib.error.URLError("no network")

    tiny.timm_vit()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for words in (
        "backbone.name=timm:vit_small_patch16_224.dino are not in the local cache",
        "backbone.checkpoint=FILE",
    ):
        refused(words, "timm:vit_small_patch16_224.dino")
    assert len(asked) == 2  # once each
    assert all(timeout <= 10 for _, timeout in asked)


def test_pixels_come_from_timm_then_from_the_size_asked_for_then_from_the_settings() -> None:
    def preprocess(kwargs: dict[str, Any], given: dict[str, Any]) -> Preprocess:
        return create_backbone(tiny.TIMM, {**tiny.TIMM_KWARGS, **kwargs}, given, pretrained=False).preprocess

    assert preprocess({"img_size": 48}, {}) == Preprocess(48, "crop", "bicubic", 0.9, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = {"mean": (0.1, 0.2, 0.3), "resize": "squash", "interpolation": "bilinear"}
    expected = Preprocess(48, "squash", "bilinear", 0.9, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert preprocess({"img_size": 48}, given) == expected
    small = {name: value for name, value in tiny.TIMM_KWARGS.items() if name != "img_size"}
    whole = create_backbone(tiny.TIMM, small, {}, pretrained=False)
    assert whole.preprocess.image_size == 224
    asked = create_backbone(tiny.TIMM, small, {"image_size": 32}, pretrained=False)
    assert asked(torch.rand(1, 3, 32, 32)).shape == (1, 24)
    assert asked.preprocess.image_size == 32


def test_a_users_own_module_gets_imagenets_pixels() -> None:
    assert create_backbone(OWN, {"dim": 4}, {"image_size": 16}).preprocess == Preprocess(image_size=16)


def test_the_example_in_the_docs_is_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    _, _, rest = page.partition("## A backbone\n")[2].partition("```python\n")
    (tmp_path / "backbone_of_the_docs.py").write_text(rest.partition("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    name, kwargs = "backbone_of_the_docs:create", {"image_size": 32, "dim": 64, "depth": 2}
    backbone = create_backbone(name, kwargs, {"image_size": 32})
    check_image_size(backbone, name, kwargs)
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"it takes backbone\.image_size=32"):
        check_image_size(create_backbone(name, kwargs, {"image_size": 48}), name, kwargs)


def test_a_vit_of_torch_hub_in_the_wrapper_of_the_docs_has_the_features_of_its_own_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    code = page.partition("## A backbone\n")[2].split("```python\n")[2].partition("```")[0]
    (tmp_path / "dino_of_the_docs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind in ("dino", "dinov2"):
        monkeypatch.setattr(torch.hub, "load", lambda repository, name, kind=kind: odd.seeded(kind))
        config = BackboneConfig(name="dino_of_the_docs:create", image_size=32)
        (warning,) = try_backbone(config).warnings
        assert warning.endswith("1 of its parameters change no feature: hub.mask_token")
        images = torch.rand(2, 3, 32, 32)
        backbone = build_backbone(config)
        right = odd.seeded(kind).eval()((images - backbone.mean) / backbone.std)
        torch.testing.assert_close(backbone(images), right, rtol=1e-5, atol=1e-5)


def test_a_timm_model_without_weights_is_refused_unless_a_file_has_them() -> None:
    refused("backbone.name=timm:vit_giant_patch14_224: timm has no weights for it", "timm:vit_giant_patch14_224")


def test_a_backbone_is_a_class_token_after_the_norm() -> None:
    images = torch.rand(2, 3, 32, 32)
    model: Any = tiny.create()
    backbone = Backbone(model, Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    tokens = model.patch_embed(images)
    for block in model.blocks:
        tokens = block(tokens)
    assert torch.equal(backbone(images), model.norm(tokens)[:, 0])
    assert backbone.embed_dim == 8
