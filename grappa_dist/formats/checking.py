"""Whether an exported model gives the embeddings of the model, on many images and in batches of several sizes.

Shapes: B images, S pixels a side, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grappa_dist.data.decoding import BadImage, open_picture
from grappa_dist.demo.drawings import picture, tasks
from grappa_dist.export import Transform
from grappa_dist.formats.exportable import Dtype
from grappa_dist.retrieval.images import open_images

Embed = Callable[[Tensor], Tensor]  # (B, 3, S, S) -> (B, D) unit rows
NEEDED: dict[Dtype, float] = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999}  # minimum cosine
CHECK_IMAGES = 1000
BATCHES = (1, 3, 17)  # sizes that are tried first; then BATCH until the end
BATCH = 32
_NOISE = 4  # every fourth generated image is noise
_PX = 256  # of generated noise


@dataclass(frozen=True)
class Check:
    """What was compared, and the least cosine of an embedding with the model's own."""

    images: int
    source: str
    min_cosine: float
    needed: float
    batch_sizes: tuple[int, ...]

    def describe(self) -> str:
        return (
            f"minimum cosine {self.min_cosine:.7f} with the model on {self.images:,} images ({self.source}); "
            f"needs {self.needed}"
        )


def check(model: Embed, exported: Embed, images: Iterable[Tensor], source: str, dtype: Dtype) -> Check:
    """Compares embeddings; `images` are (3, S, S) in [0, 1] each.

    Raises:
        ValueError: the cosine of one is below what the type must reach, or it is no unit vector; or no image can be
            read.
    """
    least, count, sizes = 1.0, 0, dict[int, None]()
    for batch in _batches(images):
        right, found = model(batch).double(), exported(batch).double()
        lengths = found.norm(dim=1)
        cosines = torch.nn.functional.cosine_similarity(right, found, dim=1)
        wrong = ~(cosines >= NEEDED[dtype]) | ~((lengths - 1).abs() < 1e-3)  # also where either is no number
        if found.shape != right.shape or bool(wrong.any()):
            row = int(wrong.nonzero()[0]) if wrong.any() else 0
            raise ValueError(
                f"the exported model differs from the model: on image {count + row + 1} of {source} its cosine is "
                f"{float(cosines[row]):.6f} (length {float(lengths[row]):.4f}), {dtype} needs {NEEDED[dtype]}"
            )
        least, count = min(least, float(cosines.min())), count + len(batch)
        sizes[len(batch)] = None
    if not count:
        raise ValueError(f"the exported model cannot be checked: of {source} none can be read")
    return Check(count, source, least, NEEDED[dtype], tuple(sizes))


def _batches(images: Iterable[Tensor]) -> Iterator[Tensor]:
    left, sizes = iter(images), iter(BATCHES)
    while batch := list(islice(left, next(sizes, BATCH))):
        yield torch.stack(batch)


def images_to_check(places: Sequence[str], count: int, transform: Transform) -> tuple[Iterator[Tensor], str]:
    """Up to `count` images as the model is given them, (3, S, S), and what they are.

    Args:
        places: folders, lists or shards; none: images are generated.
    """
    if not places:
        return map(transform, generated(count)), "generated drawings and noise"
    return islice(_readable(places, transform), count), "the given images"


def _readable(places: Sequence[str], transform: Transform) -> Iterator[Tensor]:
    images = open_images(places)
    for data in images.images(range(len(images))):
        if not isinstance(data, BadImage):
            with suppress(BadImage):  # what cannot be read is no image to compare
                yield transform(open_picture(data))


def generated(count: int) -> Iterator[Image.Image]:
    """Drawings of the demo's three tasks, and noise from fine to coarse; the same in every call."""
    kinds = [(task.name, task.labels) for task in tasks()]
    for number in range(count):
        if number % _NOISE == _NOISE - 1:
            yield _noise(number)
            continue
        name, labels = kinds[number % len(kinds)]
        yield picture(1, name, labels[number % len(labels)], number)


def _noise(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    side = int(2 ** rng.uniform(1, 8))
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((_PX, _PX), Image.Resampling.BICUBIC)
