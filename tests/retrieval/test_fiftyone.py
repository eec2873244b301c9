"""The folder for FiftyOne, held against the structure of its format: FiftyOne needs a database server, and is no part
of the tests' environment. FiftyOne 1.22.1 has read such a folder, and found what `sample` expects.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.decoding import BadImage
from grappa_dist.retrieval.fiftyone import write_fiftyone
from grappa_dist.retrieval.map import Layout
from grappa_dist.retrieval.map_images import MapImages, images_of_run
from tests.retrieval.test_map_images import finished_run
from tests.stages import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> MapImages:
    return images_of_run(finished_run(tmp_path_factory.mktemp("run")), most=100, model="k=4")


def layouts(images: MapImages) -> list[Layout]:
    points = np.random.default_rng(0).normal(size=(len(images.names), 2)).astype(np.float32)
    return [Layout(model, number + points, 0.5) for number, model in enumerate(images.embeddings)]


def test_a_folder_has_the_files_labels_embeddings_and_points_of_every_image(images: MapImages, tmp_path: Path) -> None:
    labels = images.ground_truth.labels.copy()
    labels[3] = -1
    images = replace(images, ground_truth=replace(images.ground_truth, labels=labels))
    assert write_fiftyone(tmp_path / "made", images, layouts(images)) == 22
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["data", "metadata.json", "samples.json"]
    samples = json.loads((tmp_path / "made" / "samples.json").read_text())["samples"]
    assert [sample["name"] for sample in samples] == images.names
    assert (tmp_path / "made" / samples[5]["filepath"]).read_bytes() == tiny.picture(5)
    assert samples[5]["filepath"] == "data/000005.png"
    assert (samples[5]["task"], samples[5]["ground_truth"]["label"]) == ("task 1", "class 1")
    assert samples[3]["ground_truth"] is None
    for field, expected in {
        "embedding_backbone": images.embeddings["backbone"][5],
        "embedding_k_4": images.embeddings["k=4"][5],
        "map_k_4": layouts(images)[1].points[5],
    }.items():
        np.testing.assert_allclose(samples[5][field], expected, atol=1e-6)
    ids = [sample["_id"]["$oid"] for sample in samples]
    assert len(set(ids)) == 22
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in ids)


def test_every_field_of_the_samples_is_declared_with_its_type(images: MapImages, tmp_path: Path) -> None:
    write_fiftyone(tmp_path / "made", images, layouts(images))
    about = json.loads((tmp_path / "made" / "metadata.json").read_text())
    (sample, *_) = json.loads((tmp_path / "made" / "samples.json").read_text())["samples"]
    declared = {field["db_field"]: field for field in about["sample_fields"]}
    assert sample.keys() - declared.keys() == {"_media_type", "_rand"}  # which FiftyOne declares itself
    kinds = {str: "StringField", list: "ListField", dict: "EmbeddedDocumentField"}
    for name, value in sample.items():
        if name in declared and name != "_id":
            assert declared[name]["ftype"] == f"fiftyone.core.fields.{kinds[type(value)]}"
    inside = {field["db_field"] for field in declared["ground_truth"]["fields"]}
    assert sample["ground_truth"].keys() - inside == {"_cls"}
    assert (about["name"], about["media_type"]) == ("made", "image")


def test_names_tasks_and_labels_that_are_not_utf_8_and_files_that_became_others_are_written(
    images: MapImages, tmp_path: Path
) -> None:
    word = "\udcff</script>\u2028\x1b"
    ground_truth = replace(images.ground_truth, task_names=[word] * 9, label_names=[word] * 99)
    names = [word] * len(images.names)
    hostile = replace(images, names=names, ground_truth=ground_truth, read=lambda place: b"no image")
    assert write_fiftyone(tmp_path / "made", hostile, layouts(images)) == 22
    text = (tmp_path / "made" / "samples.json").read_text()
    assert "\\ud" not in text
    sample = json.loads(text)["samples"][5]
    assert {sample["name"], sample["task"], sample["ground_truth"]["label"]} == {"\ufffd</script>\ufffd\ufffd"}


def test_images_that_are_gone_are_left_out_and_a_folder_that_holds_something_is_refused(
    images: MapImages, tmp_path: Path
) -> None:
    def read(place: int) -> bytes | BadImage:
        return BadImage("gone") if place == 2 else images.read(place)

    assert write_fiftyone(tmp_path / "made", replace(images, read=read), layouts(images)) == 21
    with pytest.raises(ValueError, match="made is there already; expected a folder that does not exist, or is empty"):
        write_fiftyone(tmp_path / "made", images, layouts(images))
