"""Small made-up copies of the data sets' original folders: the same files and formats, a handful of grey images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_image(path: Path) -> None:
    """A small image that is unlike the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = sum(path.name.encode()) % 256
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, len(path.name))).save(buffer, "JPEG", comment=path.name.encode())
    path.write_bytes(buffer.getvalue())


def write_text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_mat(path: Path, *, compressed: bool = False, **variables: Any) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables, do_compression=compressed)


def annotations(fields: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A struct array as MATLAB stores it: one row of records."""
    array = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for number, row in enumerate(rows):
        array[0, number] = tuple(row)
    return array


def aircraft(root: Path, variants: Mapping[str, int] = {"A330-200": 3, "707-320": 2, "Model B200": 2}) -> Path:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines = [
        f"{1_000_000 + 10 * number + image:07d} {variant}"
        for number, (variant, images) in enumerate(variants.items())
        for image in range(images)
    ]
    for line in lines:
        write_image(data / "images" / f"{line.partition(' ')[0]}.jpg")
    write_text(data / "variants.txt", sorted(variants))
    write_text(data / "images_variant_trainval.txt", lines[::2])
    write_text(data / "images_variant_train.txt", lines[::4])
    write_text(data / "images_variant_val.txt", lines[2::4])
    write_text(data / "images_variant_test.txt", lines[1::2])
    return data.parent


CAR_CLASSES = (1, 10, 2, 11, 2, 10, 1, 1)
_BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def cars(root: Path, name: str = "cars196") -> Path:
    folder = root / name
    files = [f"car_ims/{number:06d}.jpg" for number in range(1, len(CAR_CLASSES) + 1)]
    for file in files:
        write_image(folder / file)
    rows = [(file, 1, 1, 9, 9, label, 0) for file, label in zip(files, CAR_CLASSES, strict=True)]
    names = np.array([f"Car {number}" for number in range(1, 12)], dtype=object)[None]
    write_mat(
        folder / "cars_annos.mat",
        annotations=annotations(("relative_im_path", *_BOX, "class", "test"), rows),
        class_names=names,
    )
    return folder


def cars_by_devkit(root: Path, test_below: str = "") -> Path:
    folder = root / "stanford_cars"
    for part, labels in (("train", CAR_CLASSES[:5]), ("test", CAR_CLASSES[5:])):
        rows = [(1, 1, 9, 9, label, f"{number:05d}.jpg") for number, label in enumerate(labels, start=1)]
        for row in rows:
            write_image(folder / f"cars_{part}" / row[-1])
        table = annotations((*_BOX, "class", "fname"), rows)
        where = "devkit/cars_train_annos.mat" if part == "train" else f"{test_below}cars_test_annos_withlabels.mat"
        write_mat(folder / where, annotations=table)
    return folder


def cub(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    classes = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 10: "010.Red_winged_Blackbird"}
    files = [
        (number, f"{name}/{name[4:]}_{image:04d}_{image}.jpg") for number, name in classes.items() for image in (1, 2)
    ]
    for _, file in files:
        write_image(folder / "images" / file)
    write_text(folder / "classes.txt", [f"{number} {name}" for number, name in classes.items()])
    write_text(folder / "images.txt", [f"{image} {file}" for image, (_, file) in enumerate(files, start=1)])
    write_text(folder / "image_class_labels.txt", [f"{image} {n}" for image, (n, _) in enumerate(files, start=1)])
    write_text(folder / "train_test_split.txt", [f"{image} {image % 2}" for image in range(1, 7)])
    return folder


def flowers(root: Path) -> Path:
    folder = root / "flowers-102"
    labels = np.array([[77, 1, 10, 2, 77, 2, 100]], dtype=np.uint8)
    for image in range(1, labels.size + 1):
        write_image(folder / "jpg" / f"image_{image:05d}.jpg")
    write_mat(folder / "imagelabels.mat", labels=labels)
    write_mat(folder / "setid.mat", trnid=np.array([[1, 2]]), valid=np.array([[3]]), tstid=np.array([[4, 5, 6, 7]]))
    return folder


def food101(root: Path) -> Path:
    folder = root / "food-101"
    for label in ("waffles", "apple_pie", "baklava"):
        for image in (1005649, 23):
            write_image(folder / "images" / label / f"{image}.jpg")
    (folder / "images" / ".DS_Store").write_bytes(b"")
    write_text(folder / "meta" / "classes.txt", ["apple_pie", "baklava", "waffles"])
    write_text(folder / "meta" / "train.txt", ["apple_pie/1005649", "baklava/1005649", "waffles/1005649"])
    return folder


def products(root: Path) -> Path:
    folder = root / "Stanford_Online_Products"
    lists = {"train": [(1, 1, "bicycle"), (2, 1, "bicycle"), (3, 2, "chair")], "test": [(4, 11319, "chair")]}
    for part, rows in lists.items():
        lines = ["image_id class_id super_class_id path"]
        for image, label, kind in rows:
            file = f"{kind}_final/1110851228{label:05d}_{image}.JPG"
            write_image(folder / file)
            lines.append(f"{image} {label} 1 {file}")
        write_text(folder / f"Ebay_{part}.txt", lines)
    return folder


def dtd(root: Path) -> Path:
    folder = root / "dtd"
    for label in ("banded", "zigzagged"):
        for image in (2, 4):
            write_image(folder / "images" / label / f"{label}_{image:04d}.jpg")
    (folder / "images" / "banded" / ".directory").write_bytes(b"")
    write_text(folder / "labels" / "train1.txt", ["banded/banded_0002.jpg"])
    write_text(folder / "labels" / "labels_joint_anno.txt", ["banded/banded_0002.jpg banded"])
    return folder


def eurosat(root: Path, below: str = "2750") -> Path:
    for label in ("AnnualCrop", "SeaLake"):
        for image in (1, 2, 3):
            write_image(root / "EuroSAT" / below / label / f"{label}_{image}.jpg")
    return root / "EuroSAT"


def pets(root: Path) -> Path:
    folder = root / "oxford-iiit-pet"
    lines = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    for label, image in (("Abyssinian", 100), ("Abyssinian", 101), ("american_bulldog", 7), ("yorkshire_terrier", 1)):
        write_image(folder / "images" / f"{label}_{image}.jpg")
        lines.append(f"{label}_{image} 1 1 1")
    write_image(folder / "images" / "Abyssinian_999.jpg")  # there are images that no list names, and .mat files
    (folder / "images" / "Abyssinian_100.mat").write_bytes(b"")
    write_text(folder / "annotations" / "list.txt", lines)
    return folder


ALL = {"aircraft": aircraft, "cars": cars, "cub": cub, "flowers": flowers, "food101": food101, "products": products}
ZEROSHOT = {"dtd": dtd, "eurosat": eurosat, "pets": pets}
