"""An exported model computes in the precision of its run, on any device, unless asked otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from grappa_dist.artifacts import Store
from grappa_dist.export import export_model, load_model
from grappa_dist.models.model_config import CONFIG_FILE
from grappa_dist.models.precision import Precision
from grappa_dist.models.spec import WEIGHTS_FILE, build, exported_spec
from grappa_dist.retrieval.collection import check_model
from grappa_dist.retrieval.index import IndexedModel, SearchIndex
from grappa_dist.retrieval.opening import open_model, open_models
from tests.test_export import fake_run, images

CPU = torch.device("cpu")
OWN = "tests.models.tiny:create"


def exported(root: Path, precision: Precision) -> Path:
    spec = fake_run(root)
    spec = replace(spec, backbone=spec.backbone.model_copy(update={"precision": precision}))
    artifact = Store(root).artifact("models/neighbours", {"precision": precision}, spec.inputs)
    export_model(spec, artifact)
    Store(root).publish("model", artifact)
    return artifact.path


def test_a_model_of_a_run_in_bf16_computes_in_it_and_its_weights_are_those_that_were_given(tmp_path: Path) -> None:
    narrow, wide = exported(tmp_path / "bf16", "bf16"), exported(tmp_path / "fp32", "fp32")
    assert json.loads((narrow / CONFIG_FILE).read_text())["precision"] == "bf16"
    assert "precision" not in json.loads((wide / CONFIG_FILE).read_text())
    assert (narrow / WEIGHTS_FILE).read_bytes() == (wide / WEIGHTS_FILE).read_bytes()
    found, right = load_model(narrow)(images(4)), load_model(wide)(images(4))
    assert found.dtype == torch.float32
    assert not torch.equal(found, right)
    assert float(F.cosine_similarity(found, right).min()) > 0.999
    assert torch.equal(load_model(narrow, precision="fp32")(images(4)), right)
    assert torch.equal(load_model(wide, precision="bf16")(images(4)), found)


def test_loaded_opened_and_embedded_it_is_the_same_in_its_own_precision(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    with torch.no_grad():
        found = load_model(folder).grappa(images(4))
        assert torch.equal(open_model(folder).model(images(4)), found)
        assert torch.equal(build(exported_spec(folder), CPU)(images(4)), found)


def test_a_model_without_a_precision_is_older_and_fp32_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, "fp32")
    assert open_model(folder).precision == "fp32"
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / "manifest.json").unlink()
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"precision": "fp8"}))
    with pytest.raises(ValueError, match=r"config.json: precision='fp8': Input should be 'fp32' or 'bf16'"):
        load_model(folder)


def test_models_of_two_precisions_have_two_identities(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    own, told = exported_spec(folder), exported_spec(folder, precision="fp32")
    assert own.weights_sha256 != told.weights_sha256
    assert open_model(folder).sha256 == own.weights_sha256
    assert open_model(folder, settings=["backbone.precision=fp32"]).sha256 == told.weights_sha256


def test_an_opened_model_takes_a_precision_and_no_other_setting(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    assert open_model(folder, settings=["backbone.precision=fp32"]).precision == "fp32"
    with pytest.raises(ValueError, match=r"backbone.image_size=64: settings are for a backbone that is named"):
        open_model(folder, settings=["backbone.precision=fp32", "backbone.image_size=64"])


def test_auto_is_the_precision_that_a_model_has(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    assert open_model(folder, settings=["backbone.precision=auto"]).precision == "bf16"


def test_a_precision_beside_a_model_in_memory_is_of_the_named_backbone(tmp_path: Path) -> None:
    mine = load_model(exported(tmp_path, "bf16"), precision="fp32")
    found = open_models(mine, OWN, settings=["backbone.precision=bf16"])
    assert [one.precision for one in found.values()] == ["fp32", "bf16"]


def test_embeddings_in_another_precision_are_refused_and_the_message_names_the_precision(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    model, told = open_model(folder), open_model(folder, settings=["backbone.precision=fp32"])
    listing = {"model": told.variant, "model_sha256": told.sha256, "gallery": None}
    check_model(folder, listing, told)
    with pytest.raises(ValueError, match=r"than .*, bf16, sha256 .*in their precision \(backbone.precision\)"):
        check_model(folder, listing, model)


def test_a_backbone_is_in_fp32_unless_told_otherwise_and_its_own_in_that_of_the_model(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bf16")
    assert open_model(OWN).precision == "fp32"
    assert open_model(OWN, settings=["backbone.precision=bf16"]).precision == "bf16"
    of_both = {name: one.precision for name, one in open_models(folder, OWN).items()}
    assert list(of_both.values()) == ["bf16", "fp32"]
    told = open_models(folder, OWN, settings=["backbone.precision=bf16"])
    assert [one.precision for one in told.values()] == ["bf16", "bf16"]
    own = open_models(folder, "backbone", settings=["backbone.precision=fp32"])
    assert [one.precision for one in own.values()] == ["fp32", "fp32"]
    assert open_model(folder).backbone().precision == "bf16"


@pytest.mark.parametrize("made_in", ["fp32", "bf16"])
def test_an_index_is_queried_in_the_precision_that_it_was_made_in(tmp_path: Path, made_in: Precision) -> None:
    folder = exported(tmp_path, "bf16")
    spec = exported_spec(folder, precision=made_in)
    about = IndexedModel(str(folder), spec.name, spec.weights_sha256, None)
    index = cast(Any, SimpleNamespace(model=about, path=tmp_path / "index"))
    assert SearchIndex.open_model(index).precision == made_in
