from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist import pipeline
from grappa_dist.artifacts import Artifact
from grappa_dist.config import Config
from grappa_dist.console import EVENTS_FILE, Console, Events, read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ModelSpec, build
from grappa_dist.stages import gallery_weights
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import Embedding, embed, embed_rows, feature_rows, features_of
from grappa_dist.stages.gallery_weights import (
    effective_rank,
    galleries_of,
    load_galleries,
    set_weights,
    transitivity,
    weigh_galleries,
)
from grappa_dist.stages.ground_truth import ground_truth_of
from grappa_dist.stages.run import Run
from tests.stages import tiny

SETS = ("k=1", "k=2", "k=3")


def task_of(row: int) -> str:
    return ("even", "odd")[row % 2]


class World:
    """Features of three random adaptor sets on two tasks, and the weights of their galleries."""

    def __init__(self, root: Path) -> None:
        self.settings: Config = tiny.config(tiny.write_shards(root / "images", label=str, task=task_of))
        self.images, self.here = ImageShards.open(self.settings.data.train, None), tiny.Here()
        self.run = tiny.run_in(self.settings, root / "run", self.here)
        sets = [tiny.random_adaptors(self.run.store, self.settings, seed) for seed in (1, 2, 3)]
        self.average = ModelSpec("average", self.settings.backbone, self.settings.adapt.bottleneck, tuple(sets))
        features = {
            name: self.embedded(ModelSpec(name, *self._shape(), (s,))) for name, s in zip(SETS, sets, strict=True)
        }
        self.bad = bad_rows(self.images, features["k=1"])
        self.rows = {name: feature_rows(self.images, f) for name, f in features.items()}
        ground_truth = ground_truth_of(self.run.store, self.images, labelled=True)
        self.galleries = galleries_of(self.run.store, 0, 0.999, ground_truth, features)
        for _ in range(2):  # the second time does nothing
            weigh_galleries(self.run, self.images, ground_truth, self.rows, self.bad, self.galleries)

    def _shape(self) -> tuple[object, int]:
        return self.settings.backbone, self.settings.adapt.bottleneck

    def embedded(self, spec: ModelSpec) -> tuple[Artifact, ...]:
        features = features_of(self.run.store, spec, self.settings.embed, self.images)
        embed(self.run, self.images, spec, features)
        return features


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("galleries"))


def test_each_task_is_a_gallery_of_its_own_without_bad_rows(world: World) -> None:
    found = load_galleries(world.galleries)
    assert list(found) == ["even", "odd"]
    for number, gallery in enumerate(found.values()):
        rows = np.setdiff1d(np.arange(number, tiny.NUM_ROWS, 2), [tiny.BAD])
        shares = torch.stack([transitivity(torch.from_numpy(f.take(rows))) for f in world.rows.values()])
        assert gallery["images"] == len(rows)
        assert gallery["weights"] == pytest.approx(set_weights(shares).tolist())
        ranks = [effective_rank(torch.from_numpy(f.take(rows))) for f in world.rows.values()]
        assert gallery["effective_rank"] == pytest.approx(ranks, abs=0.01)
        assert gallery["transitivity"] == pytest.approx(shares.mean(1).tolist())
    assert found["even"]["weights"] != found["odd"]["weights"]
    assert world.here.asked.count("weigh_sets") == world.here.asked.count("read_ground_truth") == 1


def test_what_the_weights_depend_on_names_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ground_truth = world.run.store, ground_truth_of(world.run.store, world.images, labelled=True)
    names = {galleries_of(store, 0, copies, ground_truth, {}).name for copies in (0.999, 0.9)}
    monkeypatch.setattr(gallery_weights, "MOST_IMAGES", 10)
    assert len(names | {galleries_of(store, 0, 0.999, ground_truth, {}).name}) == 3


def test_the_figure_is_logged_before_anything_is_evaluated(world: World) -> None:
    logged = [e for e in read_events(world.run.store.root / "events.jsonl") if e["name"] == "gallery"]
    assert [e["task"] for e in logged] == ["even", "odd"]
    assert logged[0]["sets"] == list(SETS)
    assert logged[0]["weights"] == load_galleries(world.galleries)["even"]["weights"]


def test_every_image_is_embedded_with_the_weights_of_its_gallery(world: World) -> None:
    spec = ModelSpec(
        "gallery", world.average.backbone, world.average.bottleneck, world.average.adaptors, galleries=world.galleries
    )
    found = feature_rows(world.images, world.embedded(spec)).take(np.arange(tiny.NUM_ROWS))
    model, how = build(world.average, tiny.CPU), Embedding(8, 1)
    assert isinstance(model, Grappa)
    for number, gallery in enumerate(load_galleries(world.galleries).values()):
        rows = np.arange(number, tiny.NUM_ROWS, 2)
        model.weigh(torch.tensor(gallery["weights"]))
        for place, unit, _ in embed_rows(model, world.images, rows, device=tiny.CPU, how=how):
            np.testing.assert_allclose(found[rows[place]], unit, atol=1e-5)
    assert not found[tiny.BAD].any()


def killed_before_the_log_has_it(run: Run) -> Run:
    class Silent(Console):
        def event(self, name: str, **figures: Any) -> None:
            if name == "gallery" and figures["task"] == "odd":
                raise tiny.Killed
            super().event(name, **figures)

    return replace(run, console=Silent(Events(run.store.root / EVENTS_FILE)))


@pytest.mark.slow
def test_a_run_with_the_variant_scores_it_and_shows_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tiny.write_shards(tmp_path / "images", label=lambda row: str(row % tiny.GROUPS), task=task_of)
    fuse = {"variants": ("gallery", "average")}  # whose place in the list does not matter
    settings = tiny.config(shards, adapt={"epochs": 1}, fuse=fuse).model_copy(
        update={"data": tiny.config(shards).data.model_copy(update={"test": tuple(shards)})}
    )
    with pytest.raises(tiny.Killed):
        pipeline.run_in(killed_before_the_log_has_it(tiny.run_in(settings, tmp_path / "run", tiny.Here())))
    assert list((tmp_path / "run").glob("galleries-*/manifest.json"))
    assert not (tmp_path / "run" / "scores").exists()
    for _ in range(2):  # the second time logs nothing again
        finished = pipeline.run_in(tiny.run_in(settings, tmp_path / "run", tiny.Here()))
        assert finished is not None
    events = list(read_events(tmp_path / "run" / EVENTS_FILE))
    logged = [(number, e["task"]) for number, e in enumerate(events) if e["name"] == "gallery"]
    assert [task for _, task in logged] == ["even", "odd"]
    evaluated = [n for n, e in enumerate(events) if e["name"] == "stage_begins" and e["stage"] == "evaluate"]
    assert max(number for number, _ in logged) < min(evaluated)
    assert {r["task"] for r in finished.rows if r["model"] == "gallery"} == {"even", "odd"}
    (galleries,) = (tmp_path / "run").glob("galleries-*")
    weights = {name: g["weights"] for name, g in json.loads((galleries / "galleries.json").read_text()).items()}
    (insight,) = (tmp_path / "run" / "insight").glob("gallery-*")
    attention = json.loads((insight / "insight.json").read_text())["attention"]
    for name, layers in attention.items():
        np.testing.assert_allclose(layers, [weights[name]] * 2, atol=1e-6)
    assert "neighbours of neighbours" in (finished.report / "report.html").read_text()
