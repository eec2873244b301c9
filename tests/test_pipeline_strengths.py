"""A run that is evaluated at several strengths of adaptation: embedded once more, scored, chosen and exported."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import grappa_dist
from grappa_dist import pipeline
from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_utf8
from grappa_dist.layout import lay_out
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, build_backbone
from grappa_dist.run_models import export_from_run
from grappa_dist.variants import at_strength
from tests.models.tiny import fill
from tests.stages import tiny

IMAGES = torch.rand(2, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A finished run with labelled test images, without strengths."""
    root = tmp_path_factory.mktemp("run")
    train = tiny.write_shards(root / "train")
    test = tiny.write_shards(root / "test", (9, 12), bad=(), label=lambda row: str(row % tiny.GROUPS), seed=1)
    settings = tiny.config(
        train,
        data={"train": train, "test": test, "streams": 4, "max_bad_share": 0.05},
        fuse={"variants": ("average", "transforms")},
        evaluate={"export": "auto"},
    )
    pipeline.run_in(tiny.run_in(settings, root / "run", tiny.Here()), until="pseudo_label")
    _fill(settings, root / "run")
    here = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root / "run", here))
    assert {"k=4", "k=6", "transforms"}.isdisjoint(here.asked)
    return root / "run", settings


def _fill(settings: Config, root: Path) -> None:
    """Random weights in place of trained ones, in the artefacts of the sets and of their fusion."""
    images = [ImageShards.open(paths, None) for paths in (settings.data.train, settings.data.test)]
    flow = lay_out(settings, Store(root), *images)
    artifacts = [(artifact, ADAPTORS_FILE) for artifact in flow.adaptors.values()]
    for seed, (artifact, file) in enumerate([*artifacts, (flow.fusions["transforms"], FUSION_FILE)]):
        model = Grappa(build_backbone(settings.backbone), 2, settings.adapt.bottleneck, attention=True)
        fill(model, seed)
        save_file(
            model.attention_tensors() if file == FUSION_FILE else model.adaptor_tensors(), artifact.begin() / file
        )
        (artifact.begin() / "metrics.jsonl").touch()
        artifact.commit()


def at(settings: Config, **evaluate: Any) -> Config:
    changed = {**settings.evaluate.model_dump(), **evaluate}
    return Config.model_validate({**settings.model_dump(), "evaluate": changed})


def kept(root: Path) -> dict[str, int]:
    """All artefacts but reports and models, by their files' times of change."""
    parts = ("features", "labels", "partitions", "adaptors", "fusion", "scores", "insight", "truth")
    return {name: when for name, when in tiny.files_below(root).items() if name.startswith(parts)}


def test_other_strengths_embed_and_score_only_what_is_new_and_train_nothing(run: tuple[Path, Config]) -> None:
    root, settings = run
    before = kept(root)
    for strengths, new in (((0.5, 0.0), {"0", "0.5"}), ((2.0, 0.5), {"2"}), ((0.5,), set())):
        here = tiny.Here()
        found = pipeline.run_in(tiny.run_in(at(settings, strengths=strengths), root, here))
        assert found is not None
        assert set(here.asked) <= {"embed_shards", "evaluate"}
        assert Counter(here.asked)["evaluate"] == bool(new)
        now = kept(root)
        assert {name: now[name] for name in before} == before
        added = {name.split("/")[1] for name in now.keys() - before.keys() if name.startswith("features")}
        assert added == {f"{variant}@{s}" for variant in ("average", "transforms") for s in new}
        before = now
        assert found.verdict is not None
        named = [at_strength("average", s) for s in sorted([*strengths, 1.0])]
        learned = [name.replace("average", "transforms") for name in named]
        assert list(found.verdict.validation) == ["backbone", *named, "k=4", "k=6", *learned]
        rows = {row["model"]: row["r_precision"] for row in found.rows}
        assert list(rows) == ["backbone", "k=4", "k=6", "oracle", *named, *learned]
        assert found.rows == json.loads((found.report / "metrics.json").read_text())["rows"]
        assert all(name in found.text() for name in named)
        page = (found.report / "report.html").read_text()
        lanes = set(re.findall(r'class="lane"><p>([^<]*)', page))
        assert lanes == {"backbone", "average", "transforms", found.verdict.compared}
        assert "<h3>transforms</h3>" in page  # its attention, which is shown at full strength alone
        assert "<h3>transforms@" not in page


def test_at_0_the_features_of_a_run_are_those_of_its_backbone_bit_for_bit(run: tuple[Path, Config]) -> None:
    root, settings = run
    pipeline.run_in(tiny.run_in(at(settings, strengths=(0.0,)), root, tiny.Here()))
    paths = (root / "features" / "backbone").glob("*/rows.npy")
    frozen = [np.load(path, allow_pickle=False) for path in paths]
    for variant in ("average@0", "transforms@0"):
        folders = sorted((root / "features" / variant).iterdir())
        assert len(folders) == 2
        for folder in folders:
            rows = np.load(folder / "rows.npy", allow_pickle=False)
            assert any(np.array_equal(rows, of_backbone) for of_backbone in frozen)


def test_the_row_of_a_strength_is_exported_by_a_run_and_of_a_run(run: tuple[Path, Config], tmp_path: Path) -> None:
    root, settings = run
    chosen = at(settings, strengths=(0.25, 0.5), export="average@0.5")
    found = pipeline.run_in(tiny.run_in(chosen, root, tiny.Here()))
    assert found is not None
    assert found.verdict is not None
    assert found.verdict.exported == found.verdict.compared == "average@0.5"
    assert found.model.resolve().name.startswith("average@0.5-")
    write_utf8(root / "config.yaml", chosen.absolute(root).yaml())
    by_run = grappa_dist.load_model(found.model, trust_modules=True)
    of_run = export_from_run(root, "average@0.5", tmp_path / "row", trust_modules=True)
    unscored = export_from_run(root, "average", tmp_path / "unscored", trust_modules=True, strength=0.5)
    assert by_run.grappa.strength == 0.5
    for folder in (of_run, unscored):
        assert json.loads((folder / "config.json").read_text())["variant"] == "average@0.5"
        assert torch.equal(grappa_dist.load_model(folder, trust_modules=True)(IMAGES), by_run(IMAGES))


def test_the_best_strength_on_the_validation_half_is_exported(run: tuple[Path, Config]) -> None:
    root, settings = run
    found = pipeline.run_in(tiny.run_in(at(settings, strengths=(0.5, 2.0)), root, tiny.Here()))
    assert found is not None
    assert found.verdict is not None
    means = found.verdict.validation
    assert found.verdict.exported == next(name for name, value in means.items() if value == max(means.values()))
    config = json.loads((found.model / "config.json").read_text())
    assert (config["variant"], config["why"]["validation"]) == (found.verdict.exported, means)
    expected = 1.0 if "@" not in found.verdict.exported else float(found.verdict.exported.rpartition("@")[2])
    assert grappa_dist.load_model(found.model, trust_modules=True).grappa.strength == expected
