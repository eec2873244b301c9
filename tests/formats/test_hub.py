from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from grappa_dist import load_model
from grappa_dist.data.transforms import Preprocess
from grappa_dist.export import RetrievalModel
from grappa_dist.formats.checking import Check
from grappa_dist.formats.convert import Wanted, convert, versions
from grappa_dist.formats.exportable import describe_preprocess
from grappa_dist.formats.hub import UNKNOWN, Facts, card, code, licence_of, plain, preprocessor
from grappa_dist.models.spec import ModelSpec
from grappa_dist.report.content import ReportContent
from grappa_dist.report.page import write_report
from grappa_dist.verdict import Gain, Verdict
from tests.stages import tiny as stages
from tests.test_run_models import run

__all__ = ["run"]  # a fixture

DINO = "timm:vit_small_patch16_224.dino"
HOSTILE = "a|b`<script>\n# c"


def facts(name: str = DINO, own_weights: bool | None = False, **more: Any) -> Facts:
    config = {"variant": "average", "sets": ["k=4", "k=16"], "backbone": {"name": name, "kwargs": {}}}
    about = {"dtype": "fp32", "preprocess": describe_preprocess(Preprocess()), "versions": versions()}
    return Facts(config, about, Check(5, "the given images", 1.0, 0.9999, (1, 3)), own_weights=own_weights, **more)


@pytest.mark.parametrize(
    ("name", "own_weights", "licence", "metadata"),
    [
        (DINO, False, "apache-2.0", {"license": "apache-2.0", "base_model": "timm/vit_small_patch16_224.dino"}),
        (DINO, True, UNKNOWN, {"license": "unknown"}),
        (DINO, None, UNKNOWN, {"license": "unknown"}),
        ("mine:create", False, UNKNOWN, {"license": "unknown"}),
        ("grappa_dist.demo.backbone:create", False, "apache-2.0", {"license": "apache-2.0"}),
        (
            "timm:vit_small_patch16_dinov3",
            False,
            "dinov3-license",
            {"license": "other", "license_name": "dinov3-license"},
        ),
    ],
)
def test_the_licence_is_that_of_the_weights_where_it_is_known(
    name: str, own_weights: bool | None, licence: str, metadata: dict[str, str]
) -> None:
    given = facts(name, own_weights)
    assert licence_of(given)[0] == licence
    found = ModelCard(card(given)).data.to_dict()
    assert {key: found.get(key) for key in ("license", "license_name")} == {
        key: metadata.get(key) for key in ("license", "license_name")
    }
    assert ("base_model" in found) == (name.startswith("timm:") and own_weights is False)
    assert found["library_name"] == "grappa-dist"
    assert ("trust_modules=True" in card(given)) == (name == "mine:create")


def test_texts_from_data_are_no_markup_and_stay_on_their_line() -> None:
    assert code(HOSTILE) == "`a\\|b'<script>\\n# c`"
    assert plain("see [this](http://x) *now* <b>") == "see \\[this\\](http://x) \\*now\\* \\<b\\>"
    row = {"task": HOSTILE, "queries": 3, "r_precision": 0.5, "map_at_r": None, "recall_at_1": 1.0}
    text = card(facts(rows=[{"model": "average", **row}, {"model": "backbone", **row}], counts={"train": 9}))
    assert f"| {code(HOSTILE)} | 3 | 50.0 (50.0) | - (-) | 100.0 (100.0) |" in text.splitlines()
    assert "\n# c" not in text


def test_what_is_not_known_is_not_claimed() -> None:
    text = card(facts(own_weights=None))
    assert "Not known: this folder was made of a model without its run." in text
    assert "Not known: no labelled test images were scored with it." in text


def test_preprocessing_is_stated_by_the_names_of_the_hub() -> None:
    crop = preprocessor(describe_preprocess(Preprocess(image_size=224, crop_share=0.875)))
    assert (crop["size"], crop["crop_size"]) == ({"shortest_edge": 256}, {"height": 224, "width": 224})
    assert (crop["do_normalize"], crop["resample"], crop["do_center_crop"]) == (False, 3, True)
    squash = preprocessor(describe_preprocess(replace(Preprocess(image_size=96), resize="squash")))
    assert (squash["size"], "crop_size" in squash) == ({"height": 96, "width": 96}, False)


def gain(task: str | None) -> Gain:
    return Gain(task, 40, 4, 0.55, 0.5, 0.021, 0.079, 0.004)


def test_the_card_of_a_run_has_its_scores_with_intervals_and_loads_from_the_folder(
    run: tuple[Path, dict[str, ModelSpec]], tmp_path: Path
) -> None:
    root, _ = run
    (root / "report").mkdir()
    rows: Any = [
        {"model": model, "task": task, "queries": 40, "r_precision": value, "map_at_r": 0.4, "recall_at_1": 0.6}
        for model, value in (("backbone", 0.5), ("average", 0.55), ("k=4", 0.3))
        for task in ("birds", "food")
    ]
    verdict = Verdict(
        "average", "average", "average", gain(None), (gain("birds"), gain("food")), {}, 0, ("few queries",)
    )
    write_report(ReportContent(title="a run", rows=rows, verdict=verdict), root / "report")
    out = tmp_path / "hub"
    convert(root, out, Wanted("hub-folder", "average", check_count=4))
    names = ["README.md", "config.json", "export.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    text = (out / "README.md").read_text()
    assert "| `birds` | 40 | 55.0 (50.0) | 40.0 (40.0) | 60.0 (60.0) |" in text
    assert "| mean over tasks | 40 | +5.0 | +2.1 to +7.9 | 0.004 |" in text
    assert "- Adapted to 13 images, without labels" in text
    assert str(tmp_path) not in text
    assert str(root) not in "".join(path.read_text() for path in out.glob("*.json")) + text
    (settings,) = [block for block in text.split("```") if block.startswith("yaml")]
    assert yaml.safe_load(settings.removeprefix("yaml"))["clustering"]["num_labels"] == [4, 6]
    model = RetrievalModel.from_pretrained(out, trust_modules=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    embedding = model(model.transform(picture)[None])
    assert embedding.shape == (1, model.embed_dim)
    assert torch.equal(embedding, load_model(out, trust_modules=True)(model.transform(picture)[None]))
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": stages.SIZE_PX}
    convert(root, tmp_path / "single", Wanted("hub-folder", "k=4", check_count=4))
    assert (
        "Intervals: not known, as the run's verdict is about another model"
        in (tmp_path / "single/README.md").read_text()
    )
