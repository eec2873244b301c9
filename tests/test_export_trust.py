"""A model directory is data; and the model and its transform go to other processes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from grappa_dist.artifacts import MANIFEST, Store
from grappa_dist.config import BackboneConfig
from grappa_dist.export import Transform, embed_images, export_model, load_model
from grappa_dist.models.model_config import CONFIG_FILE
from grappa_dist.models.spec import MODULES_FILE, ModelSpec, build, note_module
from tests.models.test_spec import CPU, saved_sets
from tests.test_export import exported, images

SOURCE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom tests.models.tiny import create\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose model names the module `own_vit`, which leaves a file `ran` where it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_vit", raising=False)
    (tmp_path / "own_vit.py").write_text(SOURCE.format(marker=str(tmp_path / "ran")))
    store = Store(tmp_path / "run")
    sets, fusion = saved_sets(store, 2)
    backbone = BackboneConfig(name="own_vit:create", kwargs={"dim": 8, "depth": 2}, image_size=16)
    artifact = store.artifact("models/neighbours", {}, {})
    export_model(ModelSpec("neighbours", backbone, 3, sets, fusion), artifact)
    store.publish("model", artifact)
    del sys.modules["own_vit"]
    (tmp_path / "ran").unlink()
    return tmp_path / "run"


def test_a_model_directory_runs_no_module_that_it_names_unless_its_caller_says_so(run: Path, tmp_path: Path) -> None:
    model = tmp_path / "downloaded"
    shutil.copytree(run / "model", model)
    for refuse in (
        lambda: load_model(model),
        lambda: load_model(run, trust_modules=False),
        lambda: embed_images(model, ["nowhere"], tmp_path / "out"),
    ):
        with pytest.raises(
            ValueError, match=r"names the backbone own_vit:create: .*--trust-modules, or trust_modules=True"
        ):
            refuse()
    assert not (tmp_path / "ran").exists()
    assert load_model(model, trust_modules=True).embed_dim == 8
    assert (tmp_path / "ran").exists()


def test_a_run_directory_is_trusted_with_the_module_that_its_run_imported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = run / "index" / MODULES_FILE
    note_module(run / "index", BackboneConfig(name="timm:vit_tiny_patch16_224"))
    assert not note.exists()
    note_module(run / "index", BackboneConfig(name="own_vit:create", kwargs={"dim": 8}))
    with pytest.raises(ValueError, match="names the backbone own_vit:create"):  # other arguments
        load_model(run)
    note_module(run / "index", BackboneConfig(name="own_vit:create", kwargs={"dim": 8, "depth": 2}))

    def refused(of: Path) -> None:
        with pytest.raises(ValueError, match="names the backbone own_vit:create"):
            load_model(of)

    refused(run / "model")  # not the run's directory
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    refused(tmp_path / "copy")
    note.chmod(0o620)
    refused(run)
    note.chmod(0o600)
    monkeypatch.setattr("os.geteuid", lambda: 4321)
    refused(run)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert load_model(run)(torch.rand(2, 3, 16, 16)).shape == (2, 8)
    note.write_text("{")
    refused(run)


def test_the_model_of_several_seeds_is_trusted_as_that_of_the_first(run: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(run, several / "seed-0", symlinks=True)
    Store(several).point("model", "seed-0/model")
    with pytest.raises(ValueError, match="names the backbone own_vit:create"):
        load_model(several)
    note_module(several / "seed-0" / "index", BackboneConfig(name="own_vit:create", kwargs={"dim": 8, "depth": 2}))
    assert load_model(several).embed_dim == 8


def test_functions_of_the_standard_library_are_no_backbones(tmp_path: Path) -> None:
    _, artifact = exported(tmp_path)
    shutil.copytree(artifact.path, tmp_path / "model2")
    config = json.loads((artifact.path / CONFIG_FILE).read_text())
    config["backbone"] = {"name": "os:system", "kwargs": {"command": f"touch {tmp_path / 'ran'}"}}
    (tmp_path / "model2" / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / "model2" / MANIFEST).unlink()  # as whoever means harm would
    with pytest.raises(ValueError, match="names the backbone os:system"):
        load_model(tmp_path / "model2")
    assert not (tmp_path / "ran").exists()


class Pictures(Dataset[torch.Tensor]):
    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(Image.new("RGB", (40, 40), (row * 20, 9, 9)))


def test_a_loaded_model_pickles_copies_and_is_saved_whole(tmp_path: Path) -> None:
    exported(tmp_path)
    model, given = load_model(tmp_path), images(2)
    with torch.inference_mode():
        right = model(given)  # it holds the last attention by now
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    torch.save(model, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (saved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given), right)
        assert torch.equal(other.transform(picture), model.transform(picture))
        assert other.sets == model.sets


@pytest.mark.long
@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_the_transform_goes_to_the_workers_of_a_loader(how: str, tmp_path: Path) -> None:
    exported(tmp_path)
    pictures = Pictures(load_model(tmp_path).transform)
    (batch,) = DataLoader(pictures, 4, num_workers=1, multiprocessing_context=how)
    assert torch.equal(batch, torch.stack([pictures[row] for row in range(4)]))


def test_a_backbone_whose_tensors_have_two_names_is_exported_once_and_loads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sets, fusion = saved_sets(store, 2)
    backbone = BackboneConfig(name="tests.models.odd:wrapped", kwargs={"dim": 8, "depth": 2}, image_size=16)
    spec, artifact = ModelSpec("neighbours", backbone, 3, sets, fusion), store.artifact("models/neighbours", {}, {})
    export_model(spec, artifact)
    plain = store.artifact("models/plain", {}, {})
    own = BackboneConfig(name="tests.models.tiny:create", kwargs={"dim": 8, "depth": 2}, image_size=16)
    export_model(ModelSpec("neighbours", own, 3, sets, fusion), plain)
    sizes = [(a.path / "model.safetensors").stat().st_size for a in (artifact, plain)]
    assert sizes[0] < 1.3 * sizes[1]
    given = torch.rand(2, 3, 16, 16)
    model = load_model(artifact.path, trust_modules=True)
    right = torch.nn.functional.normalize(build(spec, CPU)(given), dim=1)
    torch.testing.assert_close(model(given), right, rtol=1e-5, atol=1e-5)


def test_a_module_that_has_changed_since_the_export_is_named_with_what_differs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sets, fusion = saved_sets(store, 2)
    backbone = BackboneConfig(name="tests.models.tiny:create", kwargs={"dim": 8, "depth": 2}, image_size=16)
    artifact = store.artifact("models/neighbours", {}, {})
    export_model(ModelSpec("neighbours", backbone, 3, sets, fusion), artifact)
    copied = tmp_path / "copied"
    shutil.copytree(artifact.path, copied)
    for kwargs, words in (
        ({"dim": 8, "depth": 3}, r"tiny:create builds here: it lacks backbone\.model\.blocks\.2"),
        ({"dim": 4, "depth": 2}, "tiny:create builds here: Error.* size mismatch"),
    ):
        config = json.loads((artifact.path / CONFIG_FILE).read_text())
        config["backbone"]["kwargs"] = kwargs
        (copied / CONFIG_FILE).write_text(json.dumps(config))
        (copied / "manifest.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=words):
            load_model(copied, trust_modules=True)
