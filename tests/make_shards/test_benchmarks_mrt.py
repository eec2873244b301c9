"""The benchmark of the paper, read from made-up copies of the original folders."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.config import load
from grappa_dist.data.shards import ImageShards
from grappa_dist.make_shards import benchmarks
from grappa_dist.make_shards.benchmarks import (
    MRT,
    Listed,
    chosen,
    comparison,
    counts,
    differences,
    find,
    gather,
    halved,
    mat_variable,
)
from grappa_dist.make_shards.cli import main
from grappa_dist.plan import plan
from tests.make_shards import layouts

CONFIG = Path(__file__).parents[2] / "configs" / "mrt.yaml"

pytest.importorskip("scipy", reason="the annotations of Cars and Flowers are MATLAB files")


def sides(listed: list[Listed]) -> dict[str, dict[str, int]]:
    """Images per class, for train and test."""
    found: dict[str, dict[str, int]] = {}
    for image in listed:
        of_side = found.setdefault(image.side or "none", {})
        of_side[image.label] = of_side.get(image.label, 0) + 1
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for write in (*layouts.ALL.values(), *layouts.ZEROSHOT.values()):
        write(tmp_path / "sets")
    return tmp_path / "sets"


def test_aircraft_splits_its_variants_by_name_whatever_list_an_image_is_in(tmp_path: Path) -> None:
    listed = benchmarks.aircraft(layouts.aircraft(tmp_path))
    assert sides(listed) == {"train": {"707-320": 2, "A330-200": 3}, "test": {"Model B200": 2}}
    assert all((tmp_path / "fgvc-aircraft-2013b" / image.file).is_file() for image in listed)


@pytest.mark.parametrize(
    "write", [layouts.cars, layouts.cars_by_devkit, lambda root: layouts.cars_by_devkit(root, "devkit/")]
)
def test_cars_splits_its_classes_by_id_in_every_layout(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    listed = benchmarks.cars(folder)
    assert sides(listed) == {"train": {"001": 3, "002": 2}, "test": {"010": 2, "011": 1}}
    assert all((folder / image.file).is_file() for image in listed)


def test_cub_splits_its_classes_by_id_and_labels_say_id_and_name(tmp_path: Path) -> None:
    listed = benchmarks.cub(layouts.cub(tmp_path))
    train = {"001.Black_footed_Albatross": 2, "002.Laysan_Albatross": 2}
    assert sides(listed) == {"train": train, "test": {"010.Red_winged_Blackbird": 2}}


def test_flowers_splits_its_classes_by_number_not_by_the_digits_of_it(tmp_path: Path) -> None:
    listed = benchmarks.flowers(layouts.flowers(tmp_path))
    assert sides(listed) == {"train": {"001": 1, "002": 2, "010": 1}, "test": {"077": 2, "100": 1}}
    assert listed[2] == Listed("jpg/image_00003.jpg", "010", "train")


def test_food_splits_its_classes_by_name_and_the_odd_one_trains(tmp_path: Path) -> None:
    listed = benchmarks.food101(layouts.food101(tmp_path))
    assert sides(listed) == {"train": {"apple_pie": 2, "baklava": 2}, "test": {"waffles": 2}}


def test_products_splits_by_its_official_lists(tmp_path: Path) -> None:
    listed = benchmarks.products(layouts.products(tmp_path))
    assert sides(listed) == {"train": {"00001": 2, "00002": 1}, "test": {"11319": 1}}
    assert listed[0].file == "bicycle_final/111085122800001_1.JPG"


def test_the_zero_shot_sets_only_test_and_pets_takes_what_its_list_names(tmp_path: Path) -> None:
    assert sides(benchmarks.dtd(layouts.dtd(tmp_path))) == {"test": {"banded": 2, "zigzagged": 2}}
    for below in ("2750", "EuroSAT_RGB"):
        folder = layouts.eurosat(tmp_path / below, below)
        assert sides(benchmarks.eurosat(folder)) == {"test": {"AnnualCrop": 3, "SeaLake": 3}}
    pets = {"Abyssinian": 2, "american_bulldog": 1, "yorkshire_terrier": 1}
    assert sides(benchmarks.pets(layouts.pets(tmp_path))) == {"test": pets}


def test_the_expected_counts_are_those_of_the_paper_and_add_up_to_its_totals() -> None:
    totals = [sum(data_set.expected[i] for data_set in MRT) for i in range(4)]
    assert totals == [11_668, 133_339, 11_665, 133_876]
    train_classes = {"aircraft": 100, "cars": 196, "cub": 200, "flowers": 102, "food101": 101}
    for data_set in MRT:
        if data_set.name in train_classes:
            split = counts(halved([Listed("", f"{label:03d}") for label in range(train_classes[data_set.name])]))
            assert (split[0], split[2]) == (data_set.expected[0], data_set.expected[2])


def test_a_count_that_differs_is_named_and_starred_and_others_are_not() -> None:
    data_set = chosen("mrt", ["flowers"])[0]
    assert differences([(data_set, data_set.expected)]) == []
    found = [(data_set, (51, 3_869, 51, 4_319))]
    assert differences(found) == ["flowers: 3,869 train images, expected 3,870"]
    table = comparison(found)
    assert "3,869 of 3,870*" in table[1]
    assert table[1].count("*") == 1


def test_mrt_becomes_one_train_folder_and_one_test_folder_with_a_task_per_data_set(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--benchmark", "mrt", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    table = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines()[1:]}
    assert table == {
        "aircraft": ["2", "5", "1", "2"],
        "cars": ["2", "5", "2", "3"],
        "cub": ["2", "4", "1", "2"],
        "flowers": ["3", "4", "2", "3"],
        "food101": ["2", "4", "1", "2"],
        "products": ["2", "3", "1", "1"],
        "all": ["13", "25", "8", "13"],
    }
    assert "warning: cub: 4 train images, expected 5,864" in printed.err
    shards = ImageShards.open([tmp_path / "out" / "test"], None)
    members = [shards.labels(row) or {} for row in range(len(shards))]
    name = "fgvc-aircraft-2013b/data/images/1000021.jpg"  # below the root, whichever data sets are taken
    assert members[0] == {"label": "Model B200", "task": "aircraft", "name": name}
    assert (
        shards.image_bytes(len(members) - 1)
        == (root / "Stanford_Online_Products" / "chair_final" / "111085122811319_4.JPG").read_bytes()
    )


def test_the_config_of_the_paper_plans_a_run_over_the_six_tasks_and_its_settings_are_the_papers(
    root: Path, tmp_path: Path
) -> None:
    assert main(["--benchmark", "mrt", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    where = [f"data.{part}={tmp_path / 'out' / part}" for part in ("train", "test")]
    paper = load(CONFIG, where)
    assert paper.clustering.num_labels == (256, 1024, 4096, 8192, 16384, 32768, 65536, 131072)
    assert (paper.backbone.name, paper.fuse.projector) == ("timm:vit_small_patch16_224.dino", (8192, 8192, 8192))
    assert (paper.adapt.learning_rate, paper.adapt.weight_decay) == (1e-3, 1e-3)
    assert (paper.fuse.lars_learning_rate, paper.fuse.lars_weight_decay) == (0.5, 1e-3)
    assert (paper.fuse.beta, paper.fuse.loss_scale, paper.fuse.refresh) == (0.0051, 0.024, True)
    text = plan(load(CONFIG, [*where, "clustering.num_labels=[2, 4]"]), tmp_path / "run")
    assert "25 training images" in text
    assert "6 models on 13 images" in text


def test_the_zero_shot_part_has_no_train_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--benchmark", "mrt", "--part", "zeroshot", "--root", str(root), "--out", str(tmp_path / "out")]
    assert main([*argv, "--workers", "1"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["test"]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "0", "0", "7", "14"]


def test_strict_refuses_other_counts_before_anything_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--benchmark", "mrt", "--root", str(root), "--only", "cub,products", "--out", str(tmp_path / "out")]
    assert main([*argv, "--strict"]) == 2
    assert "cub: 2 train classes, expected 100; cub: 4 train images, expected 5,864;" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_listed_images_that_are_not_there_are_left_out_counted_and_named(root: Path) -> None:
    (root / "CUB_200_2011/images/002.Laysan_Albatross/Laysan_Albatross_0001_1.jpg").unlink()
    logged: list[str] = []
    items, absent = gather(root, "mrt", ["cub"], strict=False, log=logged.append)
    assert len(items) == 5
    assert [name for name, _ in absent.files] == [
        "CUB_200_2011/images/002.Laysan_Albatross/Laysan_Albatross_0001_1.jpg"
    ]
    missing = "cub: listed but not there, such as images/002.Laysan_Albatross/Laysan_Albatross_0001_1.jpg"
    assert f"warning: 1 file, {missing}" in logged


def test_missing_data_sets_are_named_with_what_was_looked_for_and_where(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "food-101")
    (root / "CUB_200_2011" / "classes.txt").unlink()
    argv = ["--benchmark", "mrt", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"food101 (expected {root}/food-101 with meta/classes.txt and images)" in line
    assert f"; {root}/CUB_200_2011 lacks classes.txt)" in line
    assert "up to 2 levels below" in line
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--only", "aircraft,cars,flowers,products"]) == 0


def test_a_data_set_is_found_at_the_root_or_two_levels_below_but_not_twice(tmp_path: Path) -> None:
    cub = chosen("mrt", ["cub"])
    folder = layouts.cub(tmp_path / "birds")
    for root in (folder, folder.parent, tmp_path):
        assert find(root, cub) == {"cub": folder}
    layouts.cub(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"cub: in .*birds.* and in .*copy.*; expected one of them"):
        find(tmp_path, cub)
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        find(tmp_path / "nowhere", cub)


@pytest.mark.parametrize(
    ("data_set", "file", "text", "expected"),
    [
        (
            "aircraft",
            "data/images_variant_test.txt",
            "1000001\n",
            "images_variant_test.txt line 1: '1000001'; expected",
        ),
        ("cub", "images.txt", "7 a/b.jpg\n", "image 7 of images.txt has no class"),
        ("cub", "classes.txt", "1 001.A\n2 002.B\nx 010.C\n", "image 5 of images.txt has no class"),
        ("cub", "images.txt", "1\n", "images.txt line 1: '1'; expected <image id> <file>"),
        ("products", "Ebay_test.txt", "image_id ...\n4 x 1 a.JPG\n", "Ebay_test.txt: class 'x' is no number"),
        ("cars", "cars_annos.mat", "none", "cars_annos.mat: not a MATLAB file that scipy reads"),
        ("flowers", "imagelabels.mat", "", "imagelabels.mat: not a MATLAB file that scipy reads"),
    ],
)
def test_a_broken_list_is_named_in_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], data_set: str, file: str, text: str, expected: str
) -> None:
    folder = find(root, chosen("mrt", [data_set]))[data_set]
    (folder / file).write_text(text)
    argv = ["--benchmark", "mrt", "--root", str(root), "--only", data_set, "--out", str(root / "out")]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_mat_file_with_other_content_says_what_it_has(tmp_path: Path) -> None:
    layouts.write_mat(layouts.flowers(tmp_path) / "imagelabels.mat", classes=[1, 2])
    with pytest.raises(ValueError, match="no variable 'labels'; it has classes"):
        benchmarks.flowers(tmp_path / "flowers-102")
    folder = layouts.cars(tmp_path)
    layouts.write_mat(folder / "cars_annos.mat", annotations=layouts.annotations(("fname",), [("a",), ("b",)]))
    with pytest.raises(ValueError, match="without the field 'relative_im_path'; they have fname"):
        benchmarks.cars(folder)


def test_without_scipy_the_error_says_which_file_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = layouts.flowers(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"imagelabels\.mat, a MATLAB file: needs scipy, .* install 'grappa"):
        benchmarks.flowers(folder)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--benchmark", "mrt"], "--benchmark takes --root"),
        (["--benchmark", "mrt", "--root", "x", "--images", "y"], "for one's own images"),
        (["--images", "y", "--strict"], "belong to --benchmark"),
        ([], "expected --images, or --benchmark with --root"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--out", "out"])
    assert expected in capsys.readouterr().err


def test_a_data_set_that_is_not_of_the_part_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--benchmark", "mrt", "--root", str(root), "--only", "cub,pets", "--out", "out"]) == 2
    assert "'pets' is no data set of mrt; expected some of aircraft, cars" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_matlab_file_is_refused_by_its_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.mat"
    layouts.write_mat(path, compressed=True, labels=np.arange(200))
    whole, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(whole[:middle] + (b"" if damage == "cut" else b"\xff" * 8 + whole[middle + 8 :]))
    with pytest.raises(ValueError, match=f"{path}: not a MATLAB file that scipy reads"):
        mat_variable(path, "labels")
