"""A small exported model and a folder of drawn photos, for tests of what models are used for."""

from __future__ import annotations

from pathlib import Path

from grappa_dist.console import Console
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.opening import open_model
from tests.stages import tiny
from tests.test_export import exported

CLASSES = ("anemone", "brücke\n", "cat")
EACH = 4


def model_in(folder: Path) -> str:
    """An exported model; its path."""
    return str(exported(folder)[1].path)


def write_photos(folder: Path, *, bad: tuple[str, ...] = ()) -> list[str]:
    """Photos in class folders, alike within a class; `bad` ones are no images; their names, sorted."""
    names = []
    for number, label in enumerate(CLASSES):
        for place in range(EACH):
            name = f"{label}/{place}.png"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if name in bad else tiny.picture(number + place * tiny.GROUPS))
            names.append(name)
    return sorted(names)


def embedder(model: str, batch_size: int = 8) -> Embedder:
    return Embedder(open_model(model), Console(), batch_size, threads=1)
