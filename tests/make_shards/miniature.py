"""All nine data sets in their original folders, with enough classes and images to be trained and scored on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.make_shards.layouts import annotations, write_mat, write_text

CLASSES, EACH = 4, 4  # of a data set: half of the classes train where a data set is divided


def mrt(root: Path) -> None:
    for write in (_aircraft, _cars, _cub, _flowers, _food101, _products, _dtd, _eurosat, _pets):
        write(root)


def _draw(path: Path, task: int, label: int) -> None:
    """An image that is like those of its class: a box of its colour."""
    draws = random.Random(path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (48, 40), tuple(draws.randrange(60) for _ in range(3)))
    hue = tuple(random.Random(97 * task + label).sample(range(80, 256), 3))
    x, y = draws.randrange(20), draws.randrange(14)
    ImageDraw.Draw(image).rectangle((x, y, x + 16 + 3 * label, y + 18), hue)
    image.save(path, quality=90)


def _rows() -> Iterator[tuple[int, int]]:
    """Images, from 1, with their class, from 1."""
    for image in range(CLASSES * EACH):
        yield image + 1, image // EACH + 1


def _aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines = [f"{1_000_000 + image} Model {label}" for image, label in _rows()]
    for image, label in _rows():
        _draw(data / "images" / f"{1_000_000 + image}.jpg", 1, label)
    write_text(data / "images_variant_trainval.txt", lines[::2])
    write_text(data / "images_variant_test.txt", lines[1::2])


def _cars(root: Path) -> None:
    folder = root / "stanford_cars"
    for image, label in _rows():
        _draw(folder / f"car_ims/{image:06d}.jpg", 2, label)
    rows = [(f"car_ims/{image:06d}.jpg", label) for image, label in _rows()]
    write_mat(folder / "cars_annos.mat", annotations=annotations(("relative_im_path", "class"), rows))


def _cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    files = [(image, label, f"{label:03d}.Bird_{label}/Bird_{image:04d}.jpg") for image, label in _rows()]
    for _, label, file in files:
        _draw(folder / "images" / file, 3, label)
    write_text(folder / "classes.txt", [f"{label} {label:03d}.Bird_{label}" for label in range(1, CLASSES + 1)])
    write_text(folder / "images.txt", [f"{image} {file}" for image, _, file in files])
    write_text(folder / "image_class_labels.txt", [f"{image} {label}" for image, label, _ in files])


def _flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for image, label in _rows():
        _draw(folder / f"jpg/image_{image:05d}.jpg", 4, label)
    write_mat(folder / "imagelabels.mat", labels=np.array([[label for _, label in _rows()]], np.uint8))


def _food101(root: Path) -> None:
    for image, label in _rows():
        _draw(root / f"food-101/images/dish_{label}/{image}.jpg", 5, label)
    write_text(root / "food-101/meta/classes.txt", [f"dish_{label}" for label in range(1, CLASSES + 1)])


def _products(root: Path) -> None:
    folder = root / "Stanford_Online_Products"
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for image, label in _rows():
        file = f"chair_final/{label}_{image}.JPG"
        _draw(folder / file, 6, label)
        lists["train" if label <= CLASSES // 2 else "test"].append(f"{image} {label} 1 {file}")
    for side, lines in lists.items():
        write_text(folder / f"Ebay_{side}.txt", ["image_id class_id super_class_id path", *lines])


def _dtd(root: Path) -> None:
    for image, label in _rows():
        _draw(root / f"dtd/images/texture_{label}/texture_{image:04d}.jpg", 7, label)
    write_text(root / "dtd/labels/train1.txt", ["texture_1/texture_0001.jpg"])


def _eurosat(root: Path) -> None:
    for image, label in _rows():
        _draw(root / f"EuroSAT/2750/Land{label}/Land{label}_{image}.jpg", 8, label)


def _pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for image, label in _rows():
        _draw(folder / f"images/Breed{label}_{image}.jpg", 9, label)
    write_text(folder / "annotations/list.txt", [f"Breed{label}_{image} {label} 1 1" for image, label in _rows()])
