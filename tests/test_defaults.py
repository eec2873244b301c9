"""The settings that a run without a config starts from, goes on with, and which images of it test."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist import defaults
from grappa_dist.config import CONFIG_FILE, Config
from grappa_dist.defaults import as_overrides, settings_of_run, starting_config
from grappa_dist.inputs import look
from grappa_dist.seeds import seeds_of
from tests.stages import tiny

VIT = "tests.models.tiny:create"


def write_images(folder: Path, names: Sequence[str]) -> str:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.picture(number))
    return str(folder)


def in_classes(folder: Path, classes: int, each: int = 3, *, below: str = "") -> str:
    return write_images(folder, [f"{below}class-{c}/{i}.png" for c in range(classes) for i in range(each)])


def flat(folder: Path, count: int = 12) -> str:
    return write_images(folder, [f"{number}.png" for number in range(count)])


def keep(config: Config, root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / CONFIG_FILE).write_text(config.yaml())


def sides(config: Config, root: Path) -> dict[str, set[str | None]]:
    """The classes that train and that test; empty where nothing tests."""
    found = look(config, root)
    return {
        side: {item.label for entry in entries if entry.growing for item in entry.growing.items}
        for side, entries in (("train", found.train), ("test", found.test))
    }


def test_half_of_the_class_folders_train_and_the_others_test_and_one_account_names_them(tmp_path: Path) -> None:
    lines = list[str]()
    config = starting_config([in_classes(tmp_path / "photos", 5)], tmp_path / "run", backbone=VIT, log=lines.append)
    assert sides(config, tmp_path / "run") == {
        "train": {"class-0", "class-1", "class-2"},
        "test": {"class-3", "class-4"},
    }
    look(config, tmp_path / "run", log=lines.append)  # as the run itself does, and a plan
    assert [line for line in lines if "class-0" in line or "class-3" in line] == [
        "classes that train, without their labels: 3 (class-0, class-1, class-2)",
        "classes that test: 2 (class-3, class-4)",
    ]
    assert lines[2].startswith(f"a run keeps all settings in {tmp_path / 'run' / CONFIG_FILE}; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["val", "test"])
def test_folders_that_say_what_tests_are_taken_at_their_word(tmp_path: Path, part: str) -> None:
    in_classes(tmp_path / "photos", 4, below="train/")
    photos = in_classes(tmp_path / "photos", 2, below=f"{part}/")
    for split in (None, "folders"):
        config = starting_config([photos], tmp_path / "run", split=split)  # type: ignore[arg-type]
        assert {side: len(found) for side, found in sides(config, tmp_path).items()} == {"train": 4, "test": 2}


def test_a_flat_folder_trains_and_what_tests_can_be_named(tmp_path: Path) -> None:
    photos, labelled = flat(tmp_path / "photos"), in_classes(tmp_path / "labelled", 2)
    config = starting_config([photos], tmp_path / "run")
    assert (config.data.train, config.data.test) == ((photos,), ())
    named = starting_config([photos], tmp_path / "run", test=[labelled])
    assert named.data.test == (labelled,)
    assert sides(named, tmp_path)["test"] == {"class-0", "class-1"}
    every = starting_config([in_classes(tmp_path / "classes", 6)], tmp_path / "run", test=[labelled])
    assert len(sides(every, tmp_path)["train"]) == 6
    for words, split in {"has no folders train/": "folders", "class": "classes"}.items():
        with pytest.raises(ValueError, match=words):
            starting_config([photos], tmp_path / "run", split=split)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--split classes and --test: expected one of them"):
        starting_config([photos], tmp_path / "run", test=[labelled], split="classes")


def test_few_classes_are_not_divided_and_a_split_can_be_asked_for(tmp_path: Path) -> None:
    lines, photos = list[str](), in_classes(tmp_path / "photos", 3)
    config = starting_config([photos], tmp_path / "run", log=lines.append)
    assert config.data.test == config.data.train == (photos,)
    assert lines[0].startswith("3 class folders with 9 images, too few to be divided: all images train, without")
    assert sides(config, tmp_path)["test"] == {"class-0", "class-1", "class-2"}
    many = in_classes(tmp_path / "many", 6)
    assert starting_config([many], tmp_path / "run", split="none").data.test == ()
    tested = starting_config([many], tmp_path / "run", split="test")
    assert len(sides(tested, tmp_path)["test"]) == len(sides(tested, tmp_path)["train"]) == 6


def test_a_folder_of_shards_counts_as_its_parts(tmp_path: Path) -> None:
    for part in ("train", "test"):
        tiny.write_shards(tmp_path / "made", [12], bad=())
        (tmp_path / "made" / "part-0").rename(tmp_path / "made" / part)
    config = starting_config([str(tmp_path / "made")], tmp_path / "run")
    assert config.data.train == (str(tmp_path / "made" / "train"),)
    assert config.data.test == (str(tmp_path / "made" / "test"),)


@pytest.mark.parametrize(
    ("rows", "cpu", "gpu"),
    [
        (8, ([2], 10, 32), ([2], 10, 32)),
        (30, ([2, 8], 10, 32), ([2, 8], 10, 32)),
        (300, ([16, 64], 8, 32), ([4, 16, 64], 8, 32)),
        (900, ([32, 128], 3, 32), ([2, 8, 32, 128], 4, 32)),
        (3000, ([8, 32, 128, 512], 2, 64), ("auto", 3, 128)),
        (100_000, ([64, 256, 1024, 4096], 1, 128), ("auto", 3, 128)),
    ],
)
def test_sets_epochs_and_batches_follow_from_the_images_and_the_machine(
    rows: int, cpu: Any, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "_sizes", lambda data, root: {"train": rows, "test": 0})
    photos = flat(tmp_path / "photos", 1)

    def chosen(has_gpu: bool) -> tuple[Any, int, int]:
        config = starting_config([photos], tmp_path / "run", has_gpu=has_gpu)
        assert config.fuse.projector[0] == (8192 if has_gpu else 1024)
        assert ("neighbours" in config.fuse.variants) == has_gpu
        assert config.data.max_bad_share == pytest.approx(max(0.01, min(0.2, 5 / rows)), rel=0.05)
        ks = config.clustering.num_labels
        assert ks == "auto" or max(ks) < rows
        return ks if ks == "auto" else list(ks), config.adapt.epochs, config.adapt.global_batch

    assert chosen(False) == cpu
    assert chosen(True) == gpu


def test_test_images_choose_among_strengths_of_adaptation_and_without_them_there_are_none(tmp_path: Path) -> None:
    assert starting_config([flat(tmp_path / "photos")], tmp_path / "run").evaluate.strengths == ()
    tested = [starting_config([in_classes(tmp_path / "classes", 6)], tmp_path / "run", has_gpu=gpu) for gpu in (0, 1)]
    assert [config.evaluate.strengths for config in tested] == [(0.5, 2.0)] * 2


def test_whether_there_is_a_gpu_is_looked_at_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, lines = flat(tmp_path / "photos"), list[str]()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for found in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        starting_config([photos], tmp_path / "run", log=lines.append)
    assert [line.partition(":")[0] for line in lines if line.startswith("settings for")] == [
        "settings for a CPU, as there is no GPU",
        "settings for a GPU",
    ]
    assert any("'fuse.variants=[average, neighbours]' trains one" in line for line in lines)
    assert defaults.BACKBONE in lines[0]


def test_images_that_are_too_few_or_none_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"photos: 5 images to adapt to; expected at least 8, better some hundreds"):
        starting_config([flat(tmp_path / "photos", 5)], tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected a folder of images; .*run has no config\.yaml of an earlier run"):
        settings_of_run([], tmp_path / "run")
    with pytest.raises(ValueError, match=r"nothing at .*nowhere"):
        starting_config([str(tmp_path / "nowhere")], tmp_path / "run")


def test_settings_that_are_given_win_and_misspelt_ones_are_refused(tmp_path: Path) -> None:
    photos = flat(tmp_path / "photos")
    config = starting_config([photos], tmp_path / "run", backbone=VIT, overrides=["adapt.epochs=9", "seed=3"])
    assert (config.adapt.epochs, config.seed, config.backbone.name) == (9, 3, VIT)
    with pytest.raises(ValueError, match=r"unknown key adapt\.epoch; did you mean 'epochs'"):
        starting_config([photos], tmp_path / "run", overrides=["adapt.epoch=9"])


def test_a_run_goes_on_with_its_settings_but_for_those_that_are_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, photos = tmp_path / "run", in_classes(tmp_path / "photos", 5)
    first = settings_of_run([photos], root, backbone=VIT, overrides=["adapt.epochs=9"])
    keep(first, root)
    lines = list[str]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # another machine
    assert settings_of_run([], root, log=lines.append) == first
    assert lines == [f"{root / CONFIG_FILE}: goes on with these settings"]
    monkeypatch.chdir(tmp_path)
    assert settings_of_run(["photos"], root) == first
    lines.clear()
    changed = settings_of_run([], root, split="none", overrides=["seed=4"], log=lines.append)
    assert (changed.seed, changed.data.test, changed.adapt.epochs) == (4, (), 9)
    assert lines[-1].endswith("goes on with these settings, but for seed, data.split")
    keep(changed, root)
    assert settings_of_run([photos], root).data.split == "none"  # as it was asked for before
    others = flat(tmp_path / "others")
    assert settings_of_run([others], root, log=lines.append).data.train == (others,)
    assert re.search(r"but for data\.train, data\.split$", lines[-1])


def test_what_tests_stays_where_no_images_are_given_again(tmp_path: Path) -> None:
    config = tiny.config(["s3://bucket/train"], data={"test": ("s3://bucket/test",)})
    keep(config, tmp_path / "run")
    for given in ([], ["s3://bucket/train"]):
        assert settings_of_run(given, tmp_path / "run").data == config.data


def test_images_take_the_place_of_a_generated_data_set(tmp_path: Path) -> None:
    generated = {"train": (), "collection": "grappa_dist.demo.collection:create", "collection_kwargs": {"classes": 3}}
    keep(tiny.config([], data=generated), tmp_path / "run")
    photos, lines = flat(tmp_path / "photos"), list[str]()
    data = settings_of_run([photos], tmp_path / "run", log=lines.append).data
    assert (data.train, data.collection, data.collection_kwargs) == ((photos,), None, {})
    assert lines[-1].endswith("but for data.train, data.collection, data.collection_kwargs")


def test_workers_fit_the_machine_on_which_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, photos = tmp_path / "run", flat(tmp_path / "photos")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    config = settings_of_run([photos], root)
    assert (config.resources.cpus_per_worker, config.resources.adapt_ranks) == (8, 4)  # four workers, one set
    keep(config, root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2)))
    fewer = settings_of_run([], root).resources
    assert (fewer.cpus_per_worker, fewer.adapt_ranks) == (1, 2)


def test_settings_of_python_become_those_of_the_command() -> None:
    given = {"adapt.epochs": 5, "fuse": {"variants": ("average",)}, "out": Path("/x"), "data.shards_dir": None}
    expected = ["adapt.epochs=5", 'fuse.variants=["average"]', 'out="/x"', "data.shards_dir=null"]
    assert as_overrides(given) == expected
    for value in (object(), [object()]):
        with pytest.raises(
            ValueError, match=r"^seed: expected a number, a text, a list or None, got one of type object$"
        ):
            as_overrides({"seed": value})


def test_runs_of_several_seeds_go_on_with_the_settings_of_the_first(tmp_path: Path) -> None:
    root, photos = tmp_path / "run", flat(tmp_path / "photos")
    for seed in (10, 2):
        config = settings_of_run([photos], root, overrides=[f"seed={seed}", "adapt.epochs=9"])
        (root / f"seed-{seed}").mkdir(parents=True)
        keep(config, root / f"seed-{seed}")
    assert seeds_of(root) == [2, 10]
    found = settings_of_run([], root)
    assert (found.adapt.epochs, found.seed, found.out) == (9, 2, str(root))
    keep(found, root)
    assert seeds_of(root) == []
