from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import grappa_dist
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.checksums import MANIFEST
from grappa_dist.config import BackboneConfig
from grappa_dist.export import RetrievalModel, export_model, load_model
from grappa_dist.files import write_json
from grappa_dist.models import Grappa, create_backbone
from grappa_dist.models.model_config import CONFIG_FILE
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, ModelSpec, build, exported_spec
from grappa_dist.stages.gallery_weights import GALLERIES_FILE, set_weights, transitivity
from tests.models import tiny
from tests.test_artifacts import flip

SIZE, BOTTLENECK = 32, 3


def fake_run(root: Path, num_sets: int = 2, fused: bool = True) -> ModelSpec:
    """A run that got as far as its fusion, with random values in a timm backbone."""
    store, checkpoint = Store(root), root / "weights.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    vit = tiny.timm_vit(seed=1)
    save_file(vit.state_dict(), checkpoint)
    backbone = BackboneConfig(name=tiny.TIMM, kwargs=tiny.TIMM_KWARGS, checkpoint=str(checkpoint))

    def grappa(sets: int, seed: int) -> Grappa:
        frozen = create_backbone(tiny.TIMM, tiny.TIMM_KWARGS, {}, pretrained=False)
        made = Grappa(frozen, sets, BOTTLENECK, attention=True)
        tiny.fill(made, seed)
        return made

    sets = tuple(store.artifact(f"adaptors/k={i}", {}, {}) for i in range(num_sets))
    for seed, artifact in enumerate(sets):
        save_file(grappa(1, seed).adaptor_tensors(), artifact.begin() / ADAPTORS_FILE)
        artifact.commit()
    fusion = store.artifact("fusion/neighbours", {}, {})
    save_file(grappa(num_sets, 9).attention_tensors(), fusion.begin() / FUSION_FILE)
    fusion.commit()
    return ModelSpec("neighbours", backbone, BOTTLENECK, sets, fusion if fused else None)


def exported(root: Path, num_sets: int = 2, fused: bool = True) -> tuple[ModelSpec, Artifact]:
    spec = fake_run(root, num_sets, fused)
    artifact = Store(root).artifact("models/neighbours", {}, spec.inputs)
    export_model(spec, artifact)
    Store(root).publish("model", artifact)
    return spec, artifact


def images(num: int) -> torch.Tensor:
    return torch.rand(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_sets", "fused"), [(2, True), (2, False), (1, True)])
def test_a_loaded_model_is_the_built_one_in_unit_rows(num_sets: int, fused: bool, tmp_path: Path) -> None:
    _, artifact = exported(tmp_path / "run", num_sets, fused)
    (tmp_path / "run" / "weights.safetensors").unlink()  # the model holds its backbone
    built = None
    for place in (tmp_path / "run", tmp_path / "run" / "model", artifact.path):
        model = load_model(place)
        z = model(images(3))
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
        assert z.shape == (3, model.embed_dim)
        assert not z.requires_grad
        assert built is None or torch.equal(z, built)
        built = z
        assert model.sets == [f"k={i}" for i in range(num_sets)]
        attention = model.attention(images(3))
        assert attention.shape == (3, 2, num_sets)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2))
        assert (attention.std() > 0) == (fused and num_sets > 1)


@pytest.mark.parametrize(("num_sets", "fused"), [(3, True), (3, False), (1, True)])
def test_weights_are_exported_bit_for_bit_and_folding_them_changes_rounding_alone(
    num_sets: int, fused: bool, tmp_path: Path
) -> None:
    spec, artifact = exported(tmp_path, num_sets, fused)
    expected = build(spec, torch.device("cpu"))
    model = load_model(artifact.path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.grappa.state_dict()[name], tensor), name
    torch.testing.assert_close(model.grappa(images(3)), expected(images(3)), rtol=1e-5, atol=1e-5)
    assert model.grappa.backbone.preprocess == expected.backbone.preprocess  # type: ignore[union-attr]


def test_the_backbone_is_exported_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    spec = replace(fake_run(tmp_path), name="backbone", adaptors=(), fusion=None)
    artifact = Store(tmp_path).artifact("models/backbone", {}, spec.inputs)
    export_model(spec, artifact, {"reason": "asked for"})
    model, frozen = load_model(artifact.path), build(spec, torch.device("cpu"))
    assert torch.equal(model.grappa(images(3)), frozen(images(3)))
    assert torch.equal(build(exported_spec(artifact.path), torch.device("cpu"))(images(3)), frozen(images(3)))
    assert (model.sets, tuple(model.attention(images(3)).shape)) == ([], (3, 0, 0))
    assert json.loads((artifact.path / CONFIG_FILE).read_text())["why"] == {"reason": "asked for"}
    with pytest.raises(ValueError, match="the backbone alone and has no adaptor sets"):
        model.condition([images(4)])


def test_a_single_set_is_exported_and_loaded(tmp_path: Path) -> None:
    fused = fake_run(tmp_path, 2)
    spec = replace(fused, name="k=1", adaptors=fused.adaptors[1:], fusion=None)
    artifact = Store(tmp_path).artifact("models/k=1", {}, spec.inputs)
    export_model(spec, artifact)
    model = load_model(artifact.path)
    assert model.sets == ["k=1"]
    expected = build(spec, torch.device("cpu"))(images(3))
    torch.testing.assert_close(model.grappa(images(3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighed", [(), (0.2, 0.8, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("fused", [True, False])
def test_an_exported_model_is_built_folded_for_bulk_embedding_which_changes_rounding_alone(
    fused: bool, weighed: tuple[float, ...], tmp_path: Path
) -> None:
    spec, artifact = exported(tmp_path, 3, fused)
    bulk = build(replace(exported_spec(artifact.path), set_weights=weighed), torch.device("cpu"))
    plain = build(spec, torch.device("cpu"))
    assert isinstance(bulk, Grappa)
    assert isinstance(plain, Grappa)
    if weighed:
        plain.weigh(torch.tensor(weighed))
    wide = not fused or 1.0 in weighed  # one set of all, or one alone; else an attention of one matrix
    for layer in bulk.layers:
        assert (layer.wide is not None) == wide
        assert (layer.product is not None) == (not wide)
    with torch.inference_mode():
        torch.testing.assert_close(bulk(images(3)), plain(images(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_conditioned_on_a_gallery_weighs_its_sets_by_their_features_there(fused: bool, tmp_path: Path) -> None:
    _, artifact = exported(tmp_path, 3, fused)
    model, gallery = load_model(artifact.path), torch.rand(40, 3, SIZE, SIZE)
    before = model(gallery)
    alone = []
    for i in range(3):
        model.weigh(torch.eye(3)[i])
        alone.append(model(gallery))
    expected = set_weights(torch.stack([transitivity(z) for z in alone]))
    assert expected.std() > 0
    model.weigh(None)
    assert torch.equal(model(gallery), before)
    ran = list[int]()  # bottlenecks of every forward pass
    hook = model.grappa.register_forward_hook(lambda g, *_: ran.append(len(g.layers[0].wide.down)))
    weights = model.condition(gallery.split(17))
    hook.remove()
    assert ran == 3 * 3 * [BOTTLENECK]  # of one set alone
    torch.testing.assert_close(weights, expected)
    assert not torch.allclose(model(gallery), before, atol=1e-4)
    if not fused:
        torch.testing.assert_close(model.attention(gallery), weights.expand(40, 2, 3))
    model.weigh(None)
    assert torch.equal(model(gallery), before)


def test_a_gallery_model_is_exported_as_the_average_with_the_weights_of_each_gallery(tmp_path: Path) -> None:
    spec, store = fake_run(tmp_path, 3, fused=False), Store(tmp_path)
    galleries, artifact = store.artifact("galleries", {}, {}), store.artifact("models/gallery", {}, {})
    weights = {"birds": [0.5, 0.25, 0.25], "food": [0.0, 0.0, 1.0]}
    write_json(galleries.begin() / GALLERIES_FILE, {t: {"weights": w, "images": 9} for t, w in weights.items()})
    galleries.commit()
    export_model(replace(spec, name="gallery", galleries=galleries), artifact)
    model = load_model(artifact.path)
    assert {task: w.tolist() for task, w in model.galleries.items()} == weights
    torch.testing.assert_close(model.attention(images(2)), torch.full((2, 2, 3), 1 / 3))
    for task, w in weights.items():
        model.weigh(model.galleries[task])
        torch.testing.assert_close(model.attention(images(2)), torch.tensor(w).expand(2, 2, 3))


def test_a_description_of_a_gallery_model_takes_the_weights_of_the_gallery_it_names(tmp_path: Path) -> None:
    spec, store = fake_run(tmp_path, 3, fused=False), Store(tmp_path)
    galleries, artifact = store.artifact("galleries", {}, {}), store.artifact("models/gallery", {}, {})
    write_json(galleries.begin() / GALLERIES_FILE, {"birds": {"weights": [0.5, 0.5, 0.0]}})
    galleries.commit()
    export_model(replace(spec, name="gallery", galleries=galleries), artifact)
    named, plain = exported_spec(artifact.path, "birds"), exported_spec(artifact.path)
    assert named.inputs != plain.inputs
    given, model = images(2), load_model(artifact.path)
    model.weigh(model.galleries["birds"])
    found = torch.nn.functional.normalize(build(named, torch.device("cpu"))(given), dim=1)
    torch.testing.assert_close(found, model(given), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no weights for the gallery 'cars'; it has birds"):
        exported_spec(artifact.path, "cars")


def test_a_model_of_another_variant_has_no_galleries(tmp_path: Path) -> None:
    assert load_model(exported(tmp_path)[1].path).galleries == {}


def test_a_gallery_without_structure_is_refused_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path)
    model = load_model(artifact.path)
    before = model(images(2))
    with pytest.raises(ValueError, match="the gallery has 2 images, it needs three"):
        model.condition([images(2)])
    assert torch.equal(model(images(2)), before)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (100, 7), (5, 64)])
def test_the_transform_takes_any_image(
    size: tuple[int, int], mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = shared_model(tmp_path_factory)
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 40_000, dtype=np.uint16))
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
    pixels_seen = model.transform(image)
    assert pixels_seen.shape == (3, SIZE, SIZE)
    assert pixels_seen.dtype == torch.float32
    assert 0 <= pixels_seen.min() <= pixels_seen.max() <= 1
    assert model(pixels_seen[None]).isfinite().all()


_shared: list[RetrievalModel] = []


def shared_model(tmp_path_factory: pytest.TempPathFactory) -> RetrievalModel:
    if not _shared:
        root = tmp_path_factory.mktemp("run")
        exported(root)
        _shared.append(load_model(root))
    return _shared[0]


def test_a_white_image_is_all_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert torch.equal(
        shared_model(tmp_path_factory).transform(Image.new("RGB", (50, 40), "white")), torch.ones(3, 32, 32)
    )


def test_the_package_offers_the_same_function() -> None:
    assert grappa_dist.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        grappa_dist.load_modle  # noqa: B018


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_a_directory_without_a_model_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: expected config\.json, or model/config\.json"):
        load_model(tmp_path / place)


def test_the_config_of_an_exported_model_has_its_pixel_settings(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path)
    grey = [0.5, 0.5, 0.5]
    pixels = {"image_size": 32, "resize": "crop", "interpolation": "bicubic", "crop_share": 0.9}
    assert json.loads((artifact.path / CONFIG_FILE).read_text())["pixels"] == {**pixels, "mean": grey, "std": grey}


def test_another_format_is_refused(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path)
    path = artifact.path / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    (artifact.path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"config\.json: format 3, this version reads 1 and 2"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("where", ["run", "copy"])
def test_a_damaged_model_is_not_loaded_and_the_error_says_what_to_do(name: str, where: str, tmp_path: Path) -> None:
    _, artifact = exported(tmp_path / "run")
    folder = tmp_path / "run"
    if where == "copy":
        folder = shutil.copytree(artifact.path, tmp_path / "taken along")
    load_model(folder)
    path = (folder / "model" if where == "run" else folder) / name
    flip(path.resolve(), -2)
    with pytest.raises(ValueError, match=rf"{name} does not hold what was written: .* the model is damaged. Copy"):
        load_model(folder)
    path.resolve().unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing: the model is damaged|holds no model"):
        load_model(folder)


def test_the_weights_of_a_model_without_its_manifest_are_checked_and_older_models_are_taken_as_they_are(
    tmp_path: Path,
) -> None:
    _, artifact = exported(tmp_path)
    (artifact.path / MANIFEST).unlink()
    weights, config = artifact.path / "model.safetensors", artifact.path / CONFIG_FILE
    expected = load_model(artifact.path).grappa.state_dict()
    flip(weights, -1)
    with pytest.raises(ValueError, match=r"model.safetensors does not hold what was written"):
        exported_spec(artifact.path)
    older = json.loads(config.read_text())
    del older["files"]
    config.write_text(json.dumps(older))
    found = load_model(artifact.path).grappa.state_dict()
    assert sum(not torch.equal(found[name], expected[name]) for name in expected) == 1
