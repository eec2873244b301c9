from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import make_folder, save_array, write_json, write_utf8
from grappa_dist.layout import lay_out
from grappa_dist.models.model_config import CONFIG_FILE, FORMAT
from grappa_dist.retrieval.collection import Collection, Part
from grappa_dist.retrieval.map_images import images_of_collections, images_of_run, labels_by_name
from grappa_dist.stages.bad_rows import BAD_FILE
from grappa_dist.stages.embed import ROWS_FILE
from grappa_dist.stages.ground_truth import read_ground_truth
from grappa_dist.stages.run import CONFIG_FILE as RUN_CONFIG
from tests.retrieval.photos import write_photos
from tests.stages import tiny

SIZES, BAD = (13, 1, 9), 15
CONFIG = {  # of an exported model
    "format": FORMAT,
    "sets": ["k=4"],
    "backbone": {"name": "tests.models.tiny:create", "kwargs": {}},
    "pixels": {
        **{"image_size": tiny.SIZE_PX, "resize": "crop", "interpolation": "bicubic", "crop_share": 1.0},
        **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    },
    "bottleneck": 4,
    "attention": True,
}


def unit(seed: int, count: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def finished_run(root: Path, *, exported: str = "average") -> Path:
    """A run whose test images have labels and drawn features by every model; 1 of 23 is bad.

    Its exported model is no more than a name, unless there is one already.
    """
    train = tiny.write_shards(root / "train", (9, 4), bad=())
    test = tiny.write_shards(
        root / "test", SIZES, bad=(BAD,), label=lambda row: f"class {row % 4}", task=lambda row: f"task {row % 2}"
    )
    settings = tiny.config(train, fuse={"variants": ("average", "neighbours")})
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"test": tuple(test)})})
    images = [ImageShards.open(paths, None) for paths in (train, test)]
    flow = lay_out(settings, Store(root), *images)
    read_ground_truth(tiny.CPU, (images[1], flow.ground_truth))
    for seed, artifacts in enumerate(flow.test_features.values()):
        for number, artifact in enumerate(artifacts):
            _commit_features(artifact, images[1].part(number), images[1].shard_rows(number), seed)
    write_utf8(root / RUN_CONFIG, settings.absolute(root).yaml())
    if not (root / "model").exists():
        make_folder(root / "model")
        write_json(root / "model" / CONFIG_FILE, {**CONFIG, "variant": exported})
    return root


def _commit_features(artifact: Artifact, images: ImageShards, rows: range, seed: int) -> None:
    made = unit(100 * seed + rows.start, len(images))
    bad = [BAD - rows.start] if BAD in rows else []
    made[bad] = 0
    save_array(artifact.begin() / ROWS_FILE, made)
    write_json(artifact.begin() / BAD_FILE, {str(place): "no image" for place in bad})
    artifact.commit()


def test_a_run_shows_its_test_images_without_bad_ones_and_embeds_nothing(tmp_path: Path) -> None:
    root = finished_run(tmp_path)
    before = tiny.files_below(root)
    found = images_of_run(root, most=1000)
    assert tiny.files_below(root) == before
    assert list(found.embeddings) == ["backbone", "average"]
    kept = [row for row in range(sum(SIZES)) if row != BAD]
    assert len(found.names) == len(kept)
    assert [found.ground_truth.label_names[i] for i in found.ground_truth.labels] == [f"class {r % 4}" for r in kept]
    assert [found.ground_truth.task_names[i] for i in found.ground_truth.tasks] == [f"task {r % 2}" for r in kept]
    np.testing.assert_array_equal(found.embeddings["backbone"][:13], unit(0, 13))
    assert (found.embeddings["average"][:13] != unit(0, 13)).all()
    assert found.read(0) == tiny.picture(0)
    assert found.read(14) == tiny.picture(14)
    assert found.read(len(kept) - 1) == tiny.picture(sum(SIZES) - 1)
    assert found.notes == ["Not shown: 1 image that could not be read."]


def test_of_many_images_some_are_drawn_and_any_model_of_the_run_may_be_named(tmp_path: Path) -> None:
    root = finished_run(tmp_path, exported="backbone")
    found = images_of_run(root, most=12, model="k=4")
    assert list(found.embeddings) == ["backbone", "k=4"]
    assert (len(found.names), len(found.embeddings["k=4"]), len(found.ground_truth.labels)) == (12, 12, 12)
    assert found.notes[0] == "12 of 22 images are shown, drawn by chance."
    everything = images_of_run(root, most=1000)
    assert next(iter(everything.embeddings)) == "backbone"
    assert len(everything.embeddings) == 2  # what would have been exported without scores
    for place, name in enumerate(found.names):
        assert everything.read(everything.names.index(name)) == found.read(place)
    with pytest.raises(ValueError, match="has no model 'k=5'; it has backbone, k=4"):
        images_of_run(root, most=12, model="k=5")


def test_a_run_that_has_not_come_to_its_scores_is_an_error(tmp_path: Path) -> None:
    root = finished_run(tmp_path)
    next((root / "features" / "average").glob("*/manifest.json")).unlink()
    with pytest.raises(ValueError, match="has not come to its scores yet"):
        images_of_run(root, most=12)


def collection(count: int, bad: dict[int, str], seed: int) -> Collection:
    return Collection(
        (Part(unit(seed, count), bad, lambda: [f"{i}.png" for i in range(count)], lambda row: bytes([row])),)
    )


def test_images_that_either_model_cannot_embed_are_left_out_and_labels_go_by_name() -> None:
    both = {"backbone": collection(15, {3: "no"}, 0), "average": collection(15, {4: "no"}, 1)}
    labels = {f"{i}.png": {"label": "even" if i % 2 == 0 else "odd", "task": "numbers"} for i in range(14)}
    found = images_of_collections(both, labels, most=1000)
    kept = [row for row in range(15) if row not in (3, 4)]
    assert found.names == [f"{row}.png" for row in kept]
    np.testing.assert_array_equal(found.embeddings["average"], unit(1, 15)[kept])
    assert [found.read(place) for place in range(13)] == [bytes([row]) for row in kept]
    assert found.ground_truth.labels[-1] == -1
    assert found.notes == ["Not shown: 2 images that could not be read."]
    with pytest.raises(ValueError, match=r"the models embedded \[15, 14\] images; expected the same ones"):
        images_of_collections({"backbone": both["backbone"], "other": collection(14, {}, 2)}, {}, most=10)


def test_labels_are_those_of_class_folders_and_without_them_a_line_says_so(tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos")
    found = labels_by_name([str(tmp_path / "photos")], None, print)
    assert sorted(found) == names
    assert {name: member["label"] for name, member in found.items()} == {n: n.rpartition("/")[0].strip() for n in names}
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(tiny.picture(0))
    said: list[str] = []
    assert labels_by_name([str(tmp_path / "flat")], None, said.append) == {}
    assert "lies in no class folder" in said[0]
    with pytest.raises(ValueError, match="lies in no class folder"):
        labels_by_name([str(tmp_path / "flat")], "breed", said.append)
