"""A small image collection that the program draws itself: three retrieval tasks of differing granularity.

`kinds`      any boat is a boat: few classes, large variation within each.
`species`    butterflies that differ in a wing, a spot or a band.
`instances`  one monster seen a few times.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from grappa_dist.demo import butterflies, kinds, monsters
from grappa_dist.demo.canvas import stream


@dataclass(frozen=True)
class Drawing:
    """One image of the collection. Training must not look at `task` and `label`."""

    split: str  # "train" or "test"; the classes of the two are disjoint
    task: str
    label: str
    encoded: bytes
    suffix: str  # "jpg" or "png"


@dataclass(frozen=True)
class Task:
    """One task at a given scale: its classes in sorted order and how many images of each to draw."""

    name: str
    labels: list[str]
    per_class: dict[str, int]  # by split
    suffix: str

    def classes(self, split: str) -> list[str]:
        """The first half of the sorted classes trains, the second half tests."""
        half = (len(self.labels) + 1) // 2
        return self.labels[:half] if split == "train" else self.labels[half:]


SPLITS = ("train", "test")


def tasks(scale: float = 1.0) -> list[Task]:
    """The tasks at `scale`: kinds and species grow by images per class, instances by classes."""
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")

    def times(number: int) -> int:
        return max(2, round(number * scale))  # one image alone has nothing to retrieve

    return [
        Task("kinds", sorted(kinds.SKETCHES), {"train": times(60), "test": times(37)}, "jpg"),
        Task("species", sorted(butterflies.SPECIES), {"train": times(40), "test": times(25)}, "png"),
        Task("instances", sorted(map(monsters.name_of, range(times(150)))), {"train": 6, "test": 4}, "png"),
    ]


def sizes(scale: float = 1.0) -> dict[str, int]:
    """How many images `draw` yields of each split, without drawing them."""
    return {split: sum(len(task.classes(split)) * task.per_class[split] for task in tasks(scale)) for split in SPLITS}


def draw(scale: float = 1.0, seed: int = 0) -> Iterator[Drawing]:
    """The collection, train first; within a split task by task, class by class."""
    for split in SPLITS:
        for task in tasks(scale):
            for label in task.classes(split):
                for instance in range(task.per_class[split]):
                    image = picture(seed, task.name, label, instance)
                    yield Drawing(split, task.name, label, _encode(image, task.suffix), task.suffix)


def picture(seed: int, task: str, label: str, instance: int) -> Image.Image:
    """Image `instance` of a class, RGB; a pure function of the arguments."""
    rng = stream(seed, task, label, instance)
    if task == "instances":
        return monsters.render_monster(monsters.invent(stream(seed, "monster", label)), rng)
    if task == "species" and label in butterflies.SPECIES:
        return butterflies.render_butterfly(butterflies.SPECIES[label], rng)
    if task == "kinds" and label in kinds.SKETCHES:
        return kinds.render_sketch(kinds.SKETCHES[label], rng)
    raise ValueError(f"there is no class {label!r} in task {task!r}; see tasks() for those there are")


def _encode(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()
