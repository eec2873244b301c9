"""Exported models at a strength of adaptation: written, loaded, overridden, told apart, refused where there is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from grappa_dist.artifacts import Store
from grappa_dist.export import export_model, load_model
from grappa_dist.integrations.features import FeatureExtractor
from grappa_dist.integrations.sklearn import ImageEmbedder
from grappa_dist.models.model_config import CONFIG_FILE, check_config, with_strength
from grappa_dist.models.spec import ModelSpec, build, exported_spec
from grappa_dist.retrieval.opening import open_model, open_models
from tests.stages.tiny import picture
from tests.test_export import exported, fake_run, images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, dict[float, Path]]:
    """A trained model, and the folders of exports of it by their strengths."""
    root = tmp_path_factory.mktemp("run")
    spec, artifact = exported(root)
    folders = {1.0: artifact.path}
    for strength in (0.0, 0.5, 2.0):
        made = Store(root).artifact(f"models/neighbours@{strength}", {}, spec.at(strength).inputs)
        export_model(spec.at(strength), made)
        folders[strength] = made.path
    return spec, folders


def test_a_model_is_loaded_at_the_strength_that_it_was_exported_at(models: tuple[ModelSpec, dict[float, Path]]) -> None:
    spec, folders = models
    for strength, folder in folders.items():
        model, expected = load_model(folder), build(spec.at(strength), CPU)
        assert model.grappa.strength == strength
        torch.testing.assert_close(model.grappa(images(3)), expected(images(3)), rtol=1e-5, atol=1e-5)
        assert torch.equal(build(exported_spec(folder), CPU)(images(3)), model.grappa(images(3)))
    backbone = build(replace(spec, adaptors=(), fusion=None), CPU)
    assert torch.equal(load_model(folders[0.0]).grappa(images(3)), backbone(images(3)))


def test_the_strength_is_in_the_config_and_earlier_versions_refuse_such_a_model_alone(
    models: tuple[ModelSpec, dict[float, Path]],
) -> None:
    configs = {s: json.loads((folder / CONFIG_FILE).read_text()) for s, folder in models[1].items()}
    assert "strength" not in configs[1.0]
    assert {s: (c["format"], c["variant"]) for s, c in configs.items()} == {
        1.0: (1, "neighbours"),
        0.0: (2, "neighbours@0"),
        0.5: (2, "neighbours@0.5"),
        2.0: (2, "neighbours@2"),
    }
    assert configs[0.5]["strength"] == 0.5
    assert with_strength(configs[0.5], 1.0) == configs[1.0]
    assert with_strength(configs[1.0], 0.5) == configs[0.5]


def test_the_strength_of_a_folder_is_overridden_in_python(models: tuple[ModelSpec, dict[float, Path]]) -> None:
    folders = models[1]
    right = {s: load_model(folder)(images(3)) for s, folder in folders.items()}
    for folder in folders.values():
        for strength, expected in right.items():
            assert torch.equal(load_model(folder, strength=strength)(images(3)), expected)
            spec = exported_spec(folder, strength=strength)
            assert spec.strength == strength
            torch.testing.assert_close(F.normalize(build(spec, CPU)(images(3))), expected)
            assert torch.equal(F.normalize(open_model(folder, strength=strength).model(images(3))), expected)


def test_models_of_other_strengths_are_not_taken_for_each_other(models: tuple[ModelSpec, dict[float, Path]]) -> None:
    folders = models[1]
    opened = {s: open_model(folder) for s, folder in folders.items()}
    assert len({model.sha256 for model in opened.values()}) == 4
    assert open_model(folders[1.0], strength=0.5).sha256 == opened[0.5].sha256
    assert open_model(folders[0.5], strength=1).sha256 == opened[1.0].sha256
    assert exported_spec(folders[1.0]).inputs == {"weights": opened[1.0].sha256}  # as before there were strengths
    assert "(neighbours@0.5, sha256 " in opened[0.5].describe()
    assert list(open_models(folders[1.0], folders[1.0], strength=0.5)) == ["neighbours@0.5", "neighbours"]
    in_memory = {s: open_model(load_model(folder)).sha256 for s, folder in folders.items()}
    assert len(set(in_memory.values())) == 4


def test_a_timm_like_model_and_an_estimator_have_the_strength_of_the_folder(
    models: tuple[ModelSpec, dict[float, Path]], tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(picture(0))
    for folder in models[1].values():
        vit, model = FeatureExtractor(folder), load_model(folder)
        with Image.open(path) as photo:
            pixels, right = vit.transform(photo)[None], model(model.transform(photo)[None])
        torch.testing.assert_close(F.normalize(vit(pixels)), right)
        found = ImageEmbedder(str(folder)).fit_transform([str(path)])
        np.testing.assert_allclose(np.asarray(found), right.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [-0.5, 4.01, float("nan")])
def test_what_is_no_strength_is_refused(strength: float, models: tuple[ModelSpec, dict[float, Path]]) -> None:
    spec, folders = models
    for ask in (load_model, exported_spec, open_model):
        with pytest.raises(ValueError, match=r"^strength=\S+: expected a number from 0, the backbone, to 4"):
            ask(folders[1.0], strength=strength)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"^strength=\S+: expected a number from 0, the backbone, to 4"):
        spec.at(strength)


def test_a_model_without_adaptor_sets_has_no_strength(tmp_path: Path) -> None:
    spec = replace(fake_run(tmp_path), name="backbone", adaptors=(), fusion=None)
    artifact = Store(tmp_path).artifact("models/backbone", {}, spec.inputs)
    export_model(spec, artifact)
    words = r"^strength=0\.5: the model is the backbone alone and has no adaptor sets$"
    for ask in (load_model, exported_spec, open_model):
        with pytest.raises(ValueError, match=words):
            ask(artifact.path, strength=0.5)  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        spec.at(0.5)
    shutil.copytree(artifact.path, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / CONFIG_FILE).read_text())
    with pytest.raises(ValueError, match=r"strength=0\.5: expected none, as the model has no adaptor sets"):
        check_config({**config, "strength": 0.5}, tmp_path / CONFIG_FILE)
    with pytest.raises(ValueError, match=r"^strength=0\.5: is of a model in a folder, .* this is the backbone tests"):
        open_model("tests.models.tiny:create", strength=0.5)
    with pytest.raises(ValueError, match=r"this is a RetrievalModel in memory$"):
        open_model(load_model(artifact.path), strength=0.5)
