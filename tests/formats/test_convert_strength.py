"""Models at a strength of adaptation in other formats: the graph, the folder and the card have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grappa_dist import load_model
from grappa_dist.formats import exportable, onnx
from grappa_dist.formats.convert import Wanted, convert
from grappa_dist.formats.exportable import Exportable, trace
from grappa_dist.models.spec import ModelSpec
from tests.formats.models import model
from tests.formats.test_exportable import images
from tests.models.tiny import TIMM
from tests.test_run_models import IMAGES, run

__all__ = ["run"]  # a fixture


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize(("name", "variant"), [(TIMM, "neighbours"), (TIMM, "gallery"), ("own", "average")])
def test_the_graph_has_the_strength_of_the_model(name: str, variant: str, strength: float) -> None:
    whole = model(name, variant)
    trained = whole(images(3))
    whole.grappa.set_strength(strength)
    traced = trace(Exportable(whole), name)
    assert not [node for node in traced.graph.nodes if str(node.target).split(".")[0].endswith("_")]
    for count in (1, 3):
        torch.testing.assert_close(traced.module()(images(count))[0], whole(images(count)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(traced.module()(images(3))[0], trained, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_graph_of_half_precision_has_it_too(dtype: str) -> None:
    whole = model()
    whole.grappa.set_strength(0.5)
    found = Exportable(whole, dtype)(images(3))[0]  # type: ignore[arg-type]
    assert torch.cosine_similarity(found, whole(images(3))).min() > 0.999


@pytest.mark.slow
def test_onnxruntime_gives_the_embeddings_of_that_strength(tmp_path: Path) -> None:
    whole = model()
    whole.grappa.set_strength(0.3)
    onnx.write(
        trace(Exportable(whole), "tiny"),
        tmp_path / "model.onnx",
        {"outputs": [{"name": "embeddings"}, {"name": "weights"}]},
    )
    found = onnx.read(tmp_path / "model.onnx")(images(3))
    torch.testing.assert_close(found, whole(images(3)), rtol=1e-4, atol=1e-5)


def test_a_model_of_a_run_and_its_folder_are_written_at_any_strength(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    root, _ = run
    lines: list[str] = []
    convert(root, tmp_path / "half", Wanted("hub-folder", "average", check_count=3, strength=0.5), lines.append)
    assert lines[0].startswith("model   average@0.5, 2 adaptor sets, ")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["variant"], config["strength"], config["format"]) == ("average@0.5", 0.5, 2)
    assert json.loads((tmp_path / "half" / "export.json").read_text())["strength"] == 0.5
    assert "- Strength of adaptation: 0.5, where 0 is the backbone" in (tmp_path / "half" / "README.md").read_text()
    right = {s: load_model(tmp_path / "half", trust_modules=True, strength=s)(IMAGES) for s in (0.25, 0.5, 1)}
    assert torch.equal(load_model(tmp_path / "half", trust_modules=True)(IMAGES), right[0.5])
    for strength, expected in right.items():  # of the folder, at another strength or full
        out = tmp_path / f"{strength}.pt2"
        convert(tmp_path / "half", out, Wanted("torch", check_count=3, trust_modules=True, strength=strength))
        torch.testing.assert_close(exportable.read(out)(IMAGES), expected, rtol=1e-5, atol=1e-6)
        record = json.loads((tmp_path / f"{strength}.pt2.json").read_text())
        assert record.get("strength", 1) == strength
        assert record["variant"] == ("average" if strength == 1 else f"average@{strength}")


def test_the_backbone_has_no_strength_and_nothing_is_left(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^strength=0\.5: the model is the backbone alone"):
        convert(run[0], tmp_path / "model", Wanted("safetensors", "backbone", strength=0.5))
    assert list(tmp_path.iterdir()) == []
