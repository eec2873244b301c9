"""The original layout of each data set: which files name its images, and what they say."""

from __future__ import annotations

from pathlib import Path

from grappa_dist.data.making.benchmarks.listing import (
    Listed,
    all_test,
    class_id,
    columns_of,
    fields_of,
    halved,
    in_class_folders,
    mat_variable,
)


def aircraft(folder: Path) -> list[Listed]:
    """FGVC-Aircraft: `<image> <variant>` per line, in two lists; variants by name."""
    listed = []
    for part in ("trainval", "test"):
        for image, variant in fields_of(folder / f"data/images_variant_{part}.txt", 2, "<image> <variant>"):
            listed.append(Listed(f"data/images/{image}.jpg", variant))
    return halved(listed)


def cars(folder: Path) -> list[Listed]:
    """Stanford Cars: one folder with cars_annos.mat, or two with the devkit; classes by id."""
    if (folder / "cars_annos.mat").is_file():
        return halved(_cars_in(folder / "cars_annos.mat", "relative_im_path", ""))
    test = next(path for path in (folder, folder / "devkit") if (path / "cars_test_annos_withlabels.mat").is_file())
    train = _cars_in(folder / "devkit/cars_train_annos.mat", "fname", "cars_train/")
    return halved(train + _cars_in(test / "cars_test_annos_withlabels.mat", "fname", "cars_test/"))


def _cars_in(path: Path, name: str, below: str) -> list[Listed]:
    files, labels = columns_of(mat_variable(path, "annotations"), (name, "class"), path)
    return [
        Listed(f"{below}{file}", class_id(str(label), 3, str(path))) for file, label in zip(files, labels, strict=True)
    ]


def cub(folder: Path) -> list[Listed]:
    """CUB-200-2011: images, their classes and the classes' names in three lists; classes by id."""
    names = dict(fields_of(folder / "classes.txt", 2, "<class id> <name>"))
    labels = dict(fields_of(folder / "image_class_labels.txt", 2, "<image id> <class id>"))
    listed = []
    for image, file in fields_of(folder / "images.txt", 2, "<image id> <file>"):
        number = labels.get(image)
        if number not in names:
            raise ValueError(
                f"{folder}: image {image} of images.txt has no class; expected it in image_class_labels.txt"
            )
        # the names begin with the id already: 001.Black_footed_Albatross
        name = names[number].partition(".")[2] or names[number]
        listed.append(Listed(f"images/{file}", f"{class_id(number, 3, str(folder / 'classes.txt'))}.{name}"))
    return halved(listed)


def flowers(folder: Path) -> list[Listed]:
    """Oxford Flowers 102: the class of image i at place i of imagelabels.mat; classes by id."""
    path = folder / "imagelabels.mat"
    labels = [class_id(str(label), 3, str(path)) for label in mat_variable(path, "labels").tolist()]
    return halved([Listed(f"jpg/image_{image:05d}.jpg", label) for image, label in enumerate(labels, start=1)])


def food101(folder: Path) -> list[Listed]:
    """Food-101: class folders; classes by name."""
    return halved(in_class_folders(folder, "images"))


def products(folder: Path) -> list[Listed]:
    """Stanford Online Products: `image_id class_id super_class_id path`, in two official lists."""
    listed = []
    for side in ("train", "test"):
        path = folder / f"Ebay_{side}.txt"
        for _, label, _, file in fields_of(path, 4, "image_id class_id super_class_id path", skip=1):
            listed.append(Listed(file, class_id(label, 5, str(path)), side))
    return listed


def dtd(folder: Path) -> list[Listed]:
    """Describable Textures: class folders."""
    return all_test(in_class_folders(folder, "images"))


def eurosat(folder: Path) -> list[Listed]:
    """EuroSAT in RGB: class folders in 2750, or, in a later edition, in EuroSAT_RGB."""
    return all_test(in_class_folders(folder, "2750" if (folder / "2750").is_dir() else "EuroSAT_RGB"))


def pets(folder: Path) -> list[Listed]:
    """Oxford-IIIT Pet: `<image> <class id> <species> <breed id>` per line; the class is the name without its number."""
    lines = fields_of(folder / "annotations/list.txt", 4, "<image> <class id> <species> <breed id>")
    return all_test([Listed(f"images/{image}.jpg", image.rpartition("_")[0]) for image, *_ in lines])
