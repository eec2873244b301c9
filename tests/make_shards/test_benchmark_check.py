from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grappa_dist.make_shards import benchmark_check
from grappa_dist.make_shards.benchmark_check import SOURCES, check, describe, write_missing
from grappa_dist.make_shards.benchmarks import PARTS, counts
from tests.make_shards import layouts

BOTH = ("mrt", "zeroshot")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The nine data sets in their original layouts, with their counts as those that are expected."""
    made = {name: make(tmp_path) for name, make in (layouts.ALL | layouts.ZEROSHOT).items()}
    parts = {
        part: tuple(replace(one, expected=counts(one.read(made[one.name]))) for one in data_sets)
        for part, data_sets in PARTS.items()
    }
    monkeypatch.setattr("grappa_dist.make_shards.benchmarks.PARTS", parts)
    return tmp_path


def said(root: Path) -> dict[str, str]:
    """What is said of each data set that is not complete."""
    found = {}
    for line in describe(check(root, BOTH)):
        name, _, rest = line.partition(" ")
        if name in SOURCES and "complete: " not in rest:
            found[name] = rest.strip()
    return found


def test_complete_folders_are_said_to_be(root: Path) -> None:
    lines = list(describe(check(root, BOTH)))
    assert len(lines) == 10
    assert lines[0] == f"aircraft  complete: 7 images in {root}/fgvc-aircraft-2013b"
    assert lines[-1] == "9 of 9 data sets complete"


def test_every_missing_file_is_named_with_its_place_and_its_source(root: Path) -> None:
    for name in (
        *("CUB_200_2011/classes.txt", "flowers-102/imagelabels.mat", "oxford-iiit-pet/images/Abyssinian_101.jpg"),
        *("Stanford_Online_Products/Ebay_test.txt", "cars196/car_ims/000003.jpg", "cars196/car_ims/000001.jpg"),
    ):
        (root / name).unlink()
    (root / "food-101").rename(root / "elsewhere")
    (root / "elsewhere" / "meta" / "classes.txt").unlink()
    assert said(root) == {
        "cars": f"2 of 8 listed images missing in {root}/cars196: car_ims/000001.jpg, car_ims/000003.jpg",
        "cub": f"{root}/CUB_200_2011 lacks classes.txt",
        "flowers": f"{root}/flowers-102 lacks imagelabels.mat",
        "food101": f"not there: expected {root}/food-101 with meta/classes.txt and images",
        "products": f"{root}/Stanford_Online_Products lacks Ebay_test.txt",
        "pets": f"1 of 4 listed images missing in {root}/oxford-iiit-pet: images/Abyssinian_101.jpg",
    }
    found = check(root, BOTH)
    lines = list(describe(found))
    assert f"{' ' * 8}  get {SOURCES['food101']}" in lines
    assert lines[-1] == "3 of 9 data sets complete; not: cars, cub, flowers, food101, products, pets"
    write_missing(root / "missing.csv", found)
    listed = (root / "missing.csv").read_text().splitlines()
    assert listed[:2] == ["file,reason", f"{root}/cars196/car_ims/000001.jpg,cars: missing"]
    assert len(listed) == 9


def test_an_empty_folder_lacks_all_of_them(tmp_path: Path) -> None:
    found = check(tmp_path, BOTH)
    assert {one.name for one in found} == set(SOURCES)
    assert all(one.missing and not one.complete for one in found)
    with pytest.raises(ValueError, match="is no folder"):
        check(tmp_path / "nowhere", BOTH)


def test_other_counts_a_second_copy_and_a_list_that_cannot_be_read_are_problems(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.write_image(root / "dtd" / "images" / "banded" / "more.jpg")
    layouts.eurosat(root / "copy")
    (root / "copy" / "EuroSAT").rename(root / "EuroSAT2")
    monkeypatch.setitem(sys.modules, "scipy", None)
    found = said(root)
    assert set(found) == {"dtd", "eurosat", "cars", "flowers"}
    assert found["dtd"] == f"{root}/dtd: 5 test images, expected 4"
    assert found["eurosat"] == f"{root}/EuroSAT: is in {root}/EuroSAT2 as well; expected one of them"
    assert "needs scipy, which is not installed: pip install 'grappa-dist[benchmarks]'" in found["cars"]


def test_there_is_a_source_for_every_data_set() -> None:
    assert list(benchmark_check.SOURCES) == [one.name for part in BOTH for one in PARTS[part]]
