from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import BackboneConfig
from grappa_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from grappa_dist.models import Backbone, Grappa
from grappa_dist.models.spec import (
    ADAPTORS_FILE,
    FUSION_FILE,
    ModelSpec,
    backbone_of,
    backbone_settings,
    build,
    build_backbone,
    cached_model,
    cached_side_by_side,
    preprocess_of,
)
from tests.models import tiny

CPU = torch.device("cpu")
OWN = BackboneConfig(name="tests.models.tiny:create", kwargs={"dim": 8, "depth": 2}, image_size=16)


def saved_sets(store: Store, num_sets: int, bottleneck: int = 3) -> tuple[tuple[Artifact, ...], Artifact]:
    """Artefacts of adaptor sets and of their fusion, with random values."""
    sets = []
    for number in range(num_sets):
        single = Grappa(build_backbone(OWN), 1, bottleneck, attention=False)
        tiny.fill(single, seed=number)
        sets.append(store.artifact(f"adaptors/k={number}", {"seed": number}, {}))
        save_file(single.adaptor_tensors(), sets[-1].begin() / ADAPTORS_FILE)
        sets[-1].commit()
    fused = Grappa(build_backbone(OWN), num_sets, bottleneck, attention=True)
    tiny.fill(fused, seed=9)
    fusion = store.artifact("fusion/neighbours", {}, {})
    save_file(fused.attention_tensors(), fusion.begin() / FUSION_FILE)
    fusion.commit()
    return tuple(sets), fusion


def test_a_checkpoint_is_identified_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    save_file(tiny.create().state_dict(), first)
    shutil.copy(first, copy)
    save_file({"x": torch.zeros(1)}, other)
    settings = [backbone_settings(OWN.model_copy(update={"checkpoint": str(path)})) for path in (first, copy, other)]
    assert settings[0] == settings[1] != settings[2]
    assert str(tmp_path) not in str(settings)
    assert set(settings[0]) - set(backbone_settings(OWN)) == {"checkpoint_sha256"}
    with pytest.raises(ValueError, match=r"backbone\.checkpoint='nowhere' does not exist"):
        backbone_settings(OWN.model_copy(update={"checkpoint": "nowhere"}))


def test_a_backbone_of_a_users_own_is_identified_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_vit.py").write_text("raise AssertionError('not imported to be named')\n")
    first = backbone_settings(BackboneConfig(name="my_vit:create"))
    assert backbone_settings(BackboneConfig(name="my_vit:create")) == first
    (tmp_path / "my_vit.py").write_text("raise AssertionError('another source')\n")
    assert backbone_settings(BackboneConfig(name="my_vit:create")) != first
    for name in ("no_such_vit", "no_such_package.vit"):
        with pytest.raises(ValueError, match=f"backbone.name={name}:create: there is no module '{name}'.*PYTHONPATH"):
            backbone_settings(BackboneConfig(name=f"{name}:create"))


def test_settings_that_are_null_are_the_backbones_own() -> None:
    config = OWN.model_copy(update={"image_size": None, "mean": (0.5, 0.5, 0.5)})
    expected = replace(build_backbone(OWN).preprocess, image_size=224, mean=(0.5, 0.5, 0.5))
    assert build_backbone(config).preprocess == expected


def test_a_description_builds_the_backbone_one_set_the_average_and_the_fusion(tmp_path: Path) -> None:
    sets, fusion = saved_sets(Store(tmp_path), 3)
    images = torch.rand(2, 3, 16, 16)
    frozen = build(ModelSpec("backbone", OWN), CPU)
    assert isinstance(frozen, Backbone)
    models = {
        "k=0": build(ModelSpec("k=0", OWN, 3, sets[:1]), CPU),
        "average": build(ModelSpec("average", OWN, 3, sets), CPU),
        "neighbours": build(ModelSpec("neighbours", OWN, 3, sets, fusion), CPU),
    }
    features = [frozen(images)]
    for model in models.values():
        assert isinstance(model, Grappa)
        features.append(model(images))
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        assert preprocess_of(model) == preprocess_of(frozen)
    assert all(not torch.allclose(a, b) for i, a in enumerate(features) for b in features[:i])
    average = models["average"]
    assert isinstance(average, Grappa)
    assert torch.equal(average.last_attention(), torch.full((2, 2, 3), 1 / 3))


def test_a_worker_keeps_the_models_of_the_last_backbone_which_hold_its_weights_and_every_set_once(
    tmp_path: Path,
) -> None:
    sets, fusion = saved_sets(Store(tmp_path), 2)
    spec = ModelSpec("neighbours", OWN, 3, sets, fusion)
    specs = [ModelSpec("backbone", OWN), replace(spec, name="average", fusion=None), spec]
    first, images = cached_model(spec, CPU), torch.rand(2, 3, 16, 16)
    models, side_by_side = cached_side_by_side(specs, CPU)
    assert cached_model(replace(spec), CPU) is first is models["neighbours"]
    assert len({id(backbone_of(model)) for model in models.values()}) == 1
    layers = [model.layers for name, model in models.items() if isinstance(model, Grappa) and name != "backbone"]
    assert all(one.adaptors is other.adaptors for one, other in zip(*layers, strict=True))
    found = side_by_side([*models.values()], images)
    for one, alone in zip(found, [build(each, CPU) for each in specs], strict=True):
        assert torch.equal(one, alone(images))
    cached_model(ModelSpec("backbone", OWN.model_copy(update={"kwargs": {"dim": 8, "depth": 1}})), CPU)
    assert cached_model(spec, CPU) is not first


def test_models_that_differ_in_strength_alone_hold_sets_and_fusion_once_and_are_those_built_alone(
    tmp_path: Path,
) -> None:
    sets, fusion = saved_sets(Store(tmp_path), 2)
    whole = {"average": ModelSpec("average", OWN, 3, sets), "neighbours": ModelSpec("neighbours", OWN, 3, sets, fusion)}
    specs = [ModelSpec("backbone", OWN), *whole.values()]
    specs += [replace(spec, name=f"{name}@{s}", strength=s) for name, spec in whole.items() for s in (0.0, 0.25, 0.5)]
    models, side_by_side = cached_side_by_side(specs, CPU)
    images = torch.rand(2, 3, 16, 16)
    found = dict(zip(models, side_by_side([*models.values()], images), strict=True))
    for spec in specs:
        assert torch.equal(found[spec.name], build(spec, CPU)(images)), spec.name
        assert torch.equal(cached_model(spec, CPU)(images), found[spec.name]), spec.name
    assert torch.equal(found["average@0.0"], found["backbone"])
    assert torch.equal(found["neighbours@0.0"], found["backbone"])
    assert len({tuple(z.flatten().tolist()) for z in found.values()}) == len(specs) - 2
    adapted = {name: model for name, model in models.items() if isinstance(model, Grappa) and name != "backbone"}
    for place in range(2):
        layers = {name: model.layers[place] for name, model in adapted.items()}
        assert len({id(layer.adaptors) for layer in layers.values()}) == 1
        assert len({id(layer.attention) for name, layer in layers.items() if name.startswith("neighbours")}) == 1
        assert {layer.attention for name, layer in layers.items() if name.startswith("average")} == {None}


def test_a_strength_is_an_input_of_a_description_unless_it_is_full(tmp_path: Path) -> None:
    sets, _ = saved_sets(Store(tmp_path), 2)
    spec = ModelSpec("average", OWN, 3, sets)
    assert replace(spec, strength=1.0).inputs == spec.inputs
    assert replace(spec, strength=0.5).inputs == {**spec.inputs, "strength": "0.5"}
    assert replace(spec, strength=0.0).inputs == {**spec.inputs, "strength": "0.0"}


def test_inputs_of_a_description_are_all_its_artifacts(tmp_path: Path) -> None:
    sets, fusion = saved_sets(Store(tmp_path), 2)
    assert ModelSpec("backbone", OWN).inputs == {}
    assert ModelSpec("average", OWN, 3, sets).inputs == {"adaptors 0": sets[0], "adaptors 1": sets[1]}
    assert ModelSpec("neighbours", OWN, 3, sets, fusion).inputs["fusion"] == fusion


def test_the_preprocessing_is_that_of_the_settings() -> None:
    config = OWN.model_copy(update={"resize": "squash", "interpolation": "bilinear"})
    made = preprocess_of(build_backbone(config))
    assert (made.image_size, made.resize, made.interpolation, made.crop_share) == (16, "squash", "bilinear", 1.0)
    assert (made.mean, made.std) == (IMAGENET_MEAN, IMAGENET_STD)
