from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grappa_dist import load_model
from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_utf8
from grappa_dist.layout import lay_out
from grappa_dist.models import Grappa
from grappa_dist.models.model_config import CONFIG_FILE
from grappa_dist.models.spec import ADAPTORS_FILE, ModelSpec, build, build_backbone, note_module
from grappa_dist.run_models import export_from_run, models_of
from grappa_dist.stages.run import CONFIG_FILE as RUN_CONFIG
from tests.stages import tiny

IMAGES = torch.rand(2, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ModelSpec]]:
    """A run that has trained its two sets, with random weights, and not its fusion `transforms`."""
    root = tmp_path_factory.mktemp("run")
    shards = tiny.write_shards(root / "images", sizes=(9, 4), bad=())
    settings: Config = tiny.config(shards, fuse={"variants": ("average", "transforms")})
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)
    for seed, artifact in enumerate(flow.adaptors.values()):
        model = Grappa(build_backbone(settings.backbone), 1, settings.adapt.bottleneck, attention=False)
        draws = torch.Generator().manual_seed(seed)
        tensors = {k: 0.3 * torch.randn(t.shape, generator=draws) for k, t in model.adaptor_tensors().items()}
        save_file(tensors, artifact.begin() / ADAPTORS_FILE)
        artifact.commit()
    write_utf8(root / RUN_CONFIG, settings.absolute(root).yaml())
    note_module(root / "index", settings.backbone)
    return root, dict(flow.models)


def test_the_models_of_a_run_are_those_that_are_trained(run: tuple[Path, dict[str, ModelSpec]]) -> None:
    assert list(models_of(run[0])) == ["backbone", "k=4", "k=6", "average"]


@pytest.mark.parametrize("name", ["backbone", "k=6", "average"])
def test_any_of_them_is_exported_without_training(
    run: tuple[Path, dict[str, ModelSpec]], name: str, tmp_path: Path
) -> None:
    root, specs = run
    before = tiny.files_below(root)
    out = export_from_run(root, name, tmp_path / "mine")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert json.loads((out / CONFIG_FILE).read_text())["variant"] == name
    model, expected = load_model(out, trust_modules=True), build(specs[name], torch.device("cpu"))
    torch.testing.assert_close(model.grappa(IMAGES), expected(IMAGES), rtol=1e-5, atol=1e-5)
    assert {path: when for path, when in tiny.files_below(root).items() if path in before} == before


def test_a_model_that_is_not_there_and_a_folder_that_is_are_refused(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    root, _ = run
    with pytest.raises(ValueError, match=r"has no model 'k=5'; it has backbone, k=4, k=6, average; did you mean 'k="):
        export_from_run(root, "k=5", tmp_path / "mine")
    with pytest.raises(ValueError, match="has no model 'transforms'"):
        export_from_run(root, "transforms", tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").touch()
    with pytest.raises(ValueError, match="mine is there already"):
        export_from_run(root, "average", tmp_path / "mine")
    with pytest.raises(ValueError, match=r"expected a run directory with its config\.yaml"):
        export_from_run(tmp_path, "average", tmp_path / "other")
