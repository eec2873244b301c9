"""Models by name: runs, exported models and backbones; a backbone is the model without its adaptors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from grappa_dist.export import load_model
from grappa_dist.models import create_backbone
from grappa_dist.models.spec import load_grappa, preprocess_of
from grappa_dist.retrieval.opening import device_of, open_model, open_models
from tests.models import tiny
from tests.test_export import exported, fake_run, images

OWN = "tests.models.tiny:create"


def test_a_run_an_exported_model_and_a_loaded_one_are_the_same_model(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path / "run")
    expected = load_model(tmp_path / "run").grappa(images(3))
    opened = [open_model(tmp_path / "run"), open_model(str(artifact.path)), open_model(load_model(artifact.path))]
    for model in opened:
        assert torch.equal(model.model(images(3)), expected)
        assert model.has_adaptors
    assert opened[0].sha256 == opened[1].sha256
    assert opened[0].variant == "neighbours"
    assert opened[0].describe().startswith(f"{tmp_path / 'run'} (neighbours, sha256 {opened[0].sha256[:12]}")


def test_the_backbone_of_a_model_is_the_one_it_was_adapted_from_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    spec, _ = exported(tmp_path / "run")
    model = open_model(tmp_path / "run")
    before = model.model(images(3))
    bare = model.backbone()
    frozen = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=spec.backbone.checkpoint)
    assert torch.equal(bare.model(images(3)), frozen(images(3)))
    assert torch.equal(model.model(images(3)), before)
    assert (bare.variant, bare.has_adaptors) == ("backbone", False)
    assert bare.backbone() is bare


def test_a_backbone_is_named_as_in_a_config_and_its_hash_is_that_of_its_weights() -> None:
    one, same = open_model(OWN), open_model(OWN)
    assert one.variant == "backbone"
    assert one.sha256 == same.sha256
    with torch.no_grad():
        next(same.model.parameters()).add_(1)
    assert open_model(same.model).sha256 != one.sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_small_patch16_224_dina", "timm .* has no such model"),
        ("tests.models.tiny:creat", "has no 'creat'"),
        ("nowhere", "is no folder; expected a run directory, an exported model's, timm:<model>"),
        (".", "holds no model"),
    ],
)
def test_a_name_of_nothing_is_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_model(name)


def test_what_is_no_model_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a Linear is given as a model; expected what grappa_dist.load_model returns"):
        open_model(nn.Linear(2, 2))


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert device_of("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device 'cuda:99': this machine has cpu"):
        device_of("cuda:99")


def test_weights_of_a_gallery_are_set_where_they_are_asked_for(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path / "run", fused=False)
    (artifact.path / "manifest.json").unlink()
    config = json.loads((artifact.path / "config.json").read_text())
    config |= {"variant": "gallery", "galleries": {"cars": [1.0, 0.0], "birds": [0.0, 1.0]}}
    (artifact.path / "config.json").write_text(json.dumps(config))
    grappa = load_grappa(artifact.path)[0].eval()
    grappa.weigh(torch.tensor([0.0, 1.0]))
    grappa.fold()
    model = open_model(artifact.path, gallery="birds")
    assert torch.equal(model.model(images(2)), grappa(images(2)))
    model.weigh("cars")  # the gallery that was named stays
    assert torch.equal(model.model(images(2)), grappa(images(2)))
    free = open_model(artifact.path)
    free.weigh("birds")
    assert torch.equal(free.model(images(2)), grappa(images(2)))
    with pytest.raises(ValueError, match="has no weights for the gallery 'cats'; it has cars, birds"):
        open_model(artifact.path, gallery="cats")


def test_a_backbone_that_is_named_has_the_settings_of_a_run(tmp_path: Path) -> None:
    spec = fake_run(tmp_path / "run")
    sizes = ["backbone.kwargs={img_size: 32, embed_dim: 24, depth: 2, num_heads: 3}", "backbone.image_size=32"]
    opened = open_model(tiny.TIMM, settings=[*sizes, f"backbone.checkpoint={spec.backbone.checkpoint}"])
    frozen = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, checkpoint=spec.backbone.checkpoint)
    assert torch.equal(opened.model(images(2)), frozen(images(2)))
    with pytest.raises(ValueError, match=r"unknown key backbone.image_sise; did you mean 'image_size'"):
        open_model(OWN, settings=["backbone.image_sise=32"])
    with pytest.raises(ValueError, match=r"adapt.epochs=1: expected settings of the backbone, such as backbone.image_"):
        open_model(OWN, settings=["adapt.epochs=1"])


def test_a_model_that_has_its_own_settings_takes_none(tmp_path: Path) -> None:
    fake_run(tmp_path / "run")
    message = (
        r"img=1.jpg nonsense.typo=3: settings are for a backbone that is named, such as timm:<model>; .* has its own"
    )
    for model in (tmp_path / "run", open_model(OWN).model):
        with pytest.raises(ValueError, match=message):
            open_model(model, settings=["img=1.jpg", "nonsense.typo=3"])


def test_two_models_have_different_names_and_each_backbone_that_is_named_has_the_settings(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    path, settings = str(tmp_path / "run"), ["backbone.mean=[0.1, 0.2, 0.3]"]
    two = open_models(OWN, OWN, settings=settings)
    assert list(two) == [f"{OWN} (1)", f"{OWN} (2)"]
    assert [preprocess_of(one.model).mean for one in two.values()] == [(0.1, 0.2, 0.3)] * 2
    beside = open_models(path, OWN, settings=settings)
    assert list(beside) == ["neighbours", OWN]
    assert preprocess_of(beside[OWN].model).mean == (0.1, 0.2, 0.3)
    assert list(open_models(path, "backbone")) == ["neighbours", "backbone"]
    assert list(open_models(path, None)) == ["neighbours"]
    assert list(open_models(OWN, "backbone")) == ["backbone"]  # it has no adaptors, and is its own backbone
    with pytest.raises(ValueError, match="settings are for a backbone that is named"):
        open_models(path, "backbone", settings=settings)
