"""Labels as they come: what cannot be read is counted and named, and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.artifacts import Store
from grappa_dist.data.open_images import open_images
from grappa_dist.data.shards import BadLabels, ImageShards
from grappa_dist.files import write_json
from grappa_dist.inputs import prepared
from grappa_dist.stages import ground_truth
from grappa_dist.stages.ground_truth import (
    GroundTruth,
    ground_truth_of,
    load_ground_truth,
    read_ground_truth,
    read_members,
    write_ground_truth,
)
from tests.data.written import write_tar
from tests.stages import tiny


def test_an_image_whose_json_member_is_broken_counts_as_without_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.config(tiny.write_shards(tmp_path / "images", label=lambda row: str(row % 2), task=lambda _: "a"))
    images, read = ImageShards.open(settings.data.train, None), ImageShards.labels

    def broken(self: ImageShards, row: int) -> dict[str, Any] | None:
        if row in (3, 7):
            raise BadLabels(f"image {row}: its JSON member does not parse")
        return read(self, row)

    monkeypatch.setattr(ImageShards, "labels", broken)
    run = tiny.run_in(settings, tmp_path / "run", tiny.Here())
    artifact = ground_truth_of(run.store, images, labelled=True)
    write_ground_truth(run, images, artifact, "evaluate")
    labels = load_ground_truth(artifact).labels
    assert {row for row in range(len(images)) if labels[row] < 0} == {3, 7}
    assert "2 images count as without a label: image 3: its JSON member does not parse" in capsys.readouterr().err
    write_ground_truth(run, images, artifact, "evaluate")
    assert not capsys.readouterr().err


def tar_of(folder: Path, texts: list[str], **others: bytes) -> ImageShards:
    """Images with these JSON members, and further members of suffixes `others`."""
    members = {f"{row}.{suffix}": data for row, text in enumerate(texts) for suffix, data in [("json", text.encode())]}
    members |= {f"{row}.jpg": b"image" for row in range(len(texts))}
    members |= {f"{row}.{suffix}": data for row in range(len(texts)) for suffix, data in others.items()}
    return ImageShards.open([write_tar(folder / "t.tar", members)], None)


def read(folder: Path, images: ImageShards) -> tuple[list[tuple[int, int]], GroundTruth]:
    artifact = ground_truth_of(Store(folder / "run"), images, labelled=True)
    read_ground_truth(torch.device("cpu"), (images, artifact))
    found = load_ground_truth(artifact)
    return list(zip(found.tasks.tolist(), found.labels.tolist(), strict=True)), found


def test_absent_labels_are_no_class_and_equal_ones_are_one(tmp_path: Path) -> None:
    texts = ['{"label": "a"}', '{"label": NaN}', '{"label": null}', '{"label": ""}', '{"label": " a"}', "{}"]
    found, names = read(tmp_path, tar_of(tmp_path, texts))
    assert found == [(0, 0), (0, -1), (0, -1), (0, -1), (0, 0), (0, -1)]
    assert (names.task_names, names.label_names) == (["all"], ["a"])


def test_a_task_of_zero_is_a_task_and_numbers_are_one_in_all_ways_of_writing(tmp_path: Path) -> None:
    pairs = [("0", "1"), ("0.0", "1.0"), ('"0"', '"1"'), ("1", "1"), ("NaN", "1"), ("null", '"1.0"'), ("[0]", "[1]")]
    texts = [f'{{"task": {task}, "label": {label}}}' for task, label in pairs]
    found, names = read(tmp_path, tar_of(tmp_path, texts))
    assert found == [(0, 0), (0, 0), (0, 0), (1, 1), (2, 2), (2, 2), (0, 0)]
    assert (names.task_names, names.label_names) == (["0", "1", "all"], ["1", "1", "1"])


def test_a_json_member_that_is_a_bomb_is_without_a_label(tmp_path: Path) -> None:
    bombs = ["[" * 10**5, '{"a":' * 10**5, f'{{"label": {"9" * 10**5}}}', '{"label": "' + "x" * 2**24 + '"}']
    found, _ = read(tmp_path, tar_of(tmp_path, ['{"label": "a"}', *bombs]))
    assert found == [(0, 0)] + [(0, -1)] * 4


def test_what_counts_as_none_is_said_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tar_of(tmp_path, ['{"label": NaN}'] * 3 + ['{"label": 1}', '{"label": "1"}', '{"label": -1}'])
    settings = tiny.config([str(tmp_path / "t.tar")])
    run = tiny.run_in(settings, tmp_path / "run", tiny.Here())
    write_ground_truth(run, images, ground_truth_of(run.store, images, labelled=True), "evaluate")
    said = capsys.readouterr().err
    assert "evaluate: warning: 4 images have a label that counts as none (3 NaN, 1 -1)" in said
    assert "1 label names are written in several ways and count as one each, such as 1 and '1'" in said


@pytest.mark.parametrize(
    ("tasks", "labels", "outdated"),
    [
        (["all"], ["a", "b"], False),
        (["all"], ["1.0", "2.0"], False),
        (["a", "b"], ["x", "x"], False),
        (["all"], ["a", "nan"], True),
        (["all"], ["1", "1.0"], True),
        (["all"], ["[1, 2]"], True),
        (["all", "1"], ["a"], True),
        (["nan"], ["a"], True),
    ],
)
def test_what_an_earlier_rule_found_keeps_its_name_unless_this_rule_says_otherwise(
    tmp_path: Path, tasks: list[str], labels: list[str], outdated: bool
) -> None:
    images, store = tar_of(tmp_path, ['{"label": "a"}']), Store(tmp_path / "run")
    before = ground_truth_of(store, images, labelled=True)
    write_json(before.begin() / "names.json", {"tasks": tasks, "labels": labels, "unreadable": {"images": 0}})
    before.commit()
    after = ground_truth_of(store, images, labelled=True)
    assert (after.name != before.name) == outdated
    if outdated:
        read_ground_truth(torch.device("cpu"), (images, after))
        assert load_ground_truth(ground_truth_of(store, images, labelled=True)).label_names == ["a"]


def test_a_damaged_list_of_names_keeps_its_name_until_its_checksum_is_looked_at(tmp_path: Path) -> None:
    images, store = tar_of(tmp_path, ['{"label": "a"}']), Store(tmp_path / "run")
    artifact = ground_truth_of(store, images, labelled=True)
    read_ground_truth(torch.device("cpu"), (images, artifact))
    for text in (b"", bytes(100), b"[]", b"{}", b"null"):
        (artifact.path / "names.json").write_bytes(text)
        assert ground_truth_of(store, images, labelled=True).name == artifact.name


def test_keys_beside_which_no_label_stands_are_kept(tmp_path: Path) -> None:
    images = tar_of(tmp_path, ['{"class": 3, "url": "u"}', '{"class": 4}'], cls=b"1", txt=b"a cat")
    assert read(tmp_path, images)[1].other_keys == ["class", "url"]
    assert dict(images.shards[0].others) == {"cls": 2, "txt": 2}


def downloaded(folder: Path) -> Path:
    """Tars as img2dataset writes them: a caption, its JSON and the image of each, and other files beside the tars."""
    for number in range(2):
        members = dict[str, bytes]()
        for row in range(3):
            key = f"{number:05d}{row:04d}"
            text = {"caption": f"a photo {row}", "url": "https://x/y", "key": key, "breed": ["cat", "dog"][row % 2]}
            members[f"{key}.cls"] = str(row % 2).encode()  # before the image, as sorted names are
            members[f"{key}.jpg"] = tiny.picture(10 * number + row)
            members[f"{key}.json"] = json.dumps(text).encode()
            members[f"{key}.txt"] = f"kind {row % 2}\n".encode()
        write_tar(folder / f"{number:05d}.tar", members)
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{number:05d}_stats.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("settings", "labels", "names"),
    [
        ({}, [-1] * 6, []),
        ({"label_field": "breed"}, [0, 1, 0, 0, 1, 0], ["cat", "dog"]),
        ({"label_member": "txt"}, [0, 1, 0, 0, 1, 0], ["kind 0", "kind 1"]),
        ({"label_member": "cls"}, [0, 1, 0, 0, 1, 0], ["0", "1"]),
    ],
)
def test_an_output_of_img2dataset_gives_labels_where_a_setting_says_and_no_warning(
    tmp_path: Path, settings: dict[str, Any], labels: list[int], names: list[str]
) -> None:
    config = tiny.config([str(downloaded(tmp_path / "data"))], data=settings)
    lines = list[str]()
    images, _ = open_images(prepared(config, tmp_path / "run").data, Store(tmp_path / "run"), log=lines.append)
    assert (len(images), lines) == (6, [])
    artifact = ground_truth_of(Store(tmp_path / "run"), images, labelled=True, data=config.data)
    read_ground_truth(torch.device("cpu"), (images, artifact))
    found = load_ground_truth(artifact)
    assert (found.labels.tolist(), found.label_names) == (labels, names)
    assert artifact.settings == {"labelled": True, **settings}


def test_a_key_that_no_image_has_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    config = tiny.config([str(downloaded(tmp_path / "data"))], data={"label_field": "kind"})
    images = ImageShards.open(config.data.train, None)
    run = tiny.run_in(config, tmp_path / "run", tiny.Here())
    artifact = ground_truth_of(run.store, images, labelled=True, data=config.data)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data\.label_field=kind: no image has a label there; .*'caption', 'url'"):
            write_ground_truth(run, images, artifact, "evaluate")


def test_labels_that_several_tasks_read_are_those_of_one_to_the_byte_and_a_killed_read_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ['"b"', "1", '"1"', "NaN", "1.0", "null", '"  b"', "[2]", "{}", "true", '""', "7", '"NaN"', "[]", '"ü"']
    paths = []
    for shard, size in enumerate((5, 1, 9, 3, 12)):
        members = dict[str, bytes]()
        for row in range(size):
            at = 3 * shard + row
            text = f'{{"label": {values[at % len(values)]}, "task": {values[(at * 7) % 4]}, "k{at % 3}": 0}}'
            members[f"{row}.json"] = (text if at % 8 != 5 else "{").encode()
            members[f"{row}.jpg"] = b"image"
        paths.append(write_tar(tmp_path / f"{shard}.tar", members))
    images = ImageShards.open(paths, None)
    alone = ground_truth_of(Store(tmp_path / "alone"), images, labelled=True)
    read_ground_truth(torch.device("cpu"), (images, alone))
    monkeypatch.setattr(ground_truth, "ROWS_PER_TASK", 6)
    here = tiny.Here()
    run = tiny.run_in(tiny.config([str(path) for path in paths]), tmp_path / "several", here)
    several = ground_truth_of(run.store, images, labelled=True)
    first, *others = ground_truth._tasks_of(images, several)
    assert [len(task.shards) for task in (first, *others)] == [2, 1, 1, 1]  # uneven
    read_members(torch.device("cpu"), first)  # a run that was killed then
    before = tiny.files_below(several.partial)
    write_ground_truth(run, images, several, "evaluate")
    assert here.asked == ["read_members"] * 4 + ["join_members"]
    assert set(before) == {f"{first.name}.json", f"{first.name}.npy"} | {n for n in before if n.startswith(".")}
    names = {path.name for path in several.path.iterdir()}
    assert names == {path.name for path in alone.path.iterdir()}
    for name in names - {"manifest.json"}:
        assert (several.path / name).read_bytes() == (alone.path / name).read_bytes(), name
    assert len(load_ground_truth(several).label_names) > 4
