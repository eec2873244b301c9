"""What is searched: the images under one or two models, and the answer to a batch of queries.

Shapes: q queries, S pixels a side, D channels, L layers, N adaptor sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import BadImage, Picture, Pixels, open_picture, suffix_of
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.models import Grappa
from grappa_dist.models.spec import preprocess_of
from grappa_dist.report.gallery import small_jpeg
from grappa_dist.retrieval.collection import Collection, open_collection
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.index import describe_exact, open_index
from grappa_dist.retrieval.nearest import Found, nearest
from grappa_dist.retrieval.opening import OpenModel, device_of
from grappa_dist.retrieval.search import Find, Hit
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.stages.embed import to_images

THUMBNAIL_PX = 320  # the longer side
SHOWN = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif", "bmp": "image/bmp"}


@dataclass(frozen=True)
class Query:
    """An image that is searched for, as the models see it."""

    pixels: Pixels  # (S, S, 3)
    hits: int  # wanted


@dataclass(frozen=True)
class Answer:
    """What was found for a query."""

    hits: tuple[tuple[Hit, ...], ...]  # of each column, nearest first
    weights: NDArray[np.float32] | None  # (L, N) of the adaptor sets; None without


@dataclass(frozen=True)
class Column:
    """A model with the images that it has embedded."""

    model: OpenModel
    collection: Collection
    find: Find | None = None  # by an index; None: by comparing all
    is_exact: bool = True

    def nearest(self, queries: NDArray[np.float32], k: int) -> Found:
        """The k nearest images of unit rows (q, D)."""
        if self.find is not None:
            return self.find(queries, k)
        return nearest(queries, self.collection.rows, self.collection.bad, k, self.model.device)


@dataclass(frozen=True)
class Searcher:
    """The columns of a page; all models see an image as the same pixels."""

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        first, *others = (preprocess_of(column.model.model) for column in self.columns)
        if any(other != first for other in others):
            names = " and ".join(column.model.describe() for column in self.columns)
            raise ValueError(f"{names} see images at other sizes or crops; expected two models of one backbone")

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the adaptor sets whose weights are shown, (N,)."""
        return next((column.model.sets for column in self.columns if column.model.has_adaptors), ())

    def query(self, picture: Picture, hits: int) -> Query:
        """A query from an image; may run in any thread.

        Raises:
            BadImage: the image does not decode.
        """
        return Query(preprocess_of(self.columns[0].model.model).test(picture), hits)

    def answer(self, queries: Sequence[Query]) -> list[Answer | Exception]:
        """What is found for each query, in one pass of each model; not to be called by two threads at once."""
        most = max(query.hits for query in queries)
        pixels = np.stack([query.pixels for query in queries])
        hits: list[list[tuple[Hit, ...]]] = [[] for _ in queries]
        weights: NDArray[np.float32] | None = None
        finite = np.ones(len(queries), dtype=bool)
        for column in self.columns:
            rows, of_sets = _embedded(column.model, pixels)
            weights = of_sets if of_sets is not None else weights
            finite &= rows.any(1)
            found = column.nearest(rows, most)
            for number, query in enumerate(queries):
                hits[number].append(_hits(column.collection, found, number)[: query.hits])
        refused = ValueError("the model's features of this image are not finite (NaN or infinite)")
        return [
            Answer(tuple(hits[n]), None if weights is None else weights[n]) if finite[n] else refused
            for n in range(len(queries))
        ]

    def original(self, column: int, row: int) -> tuple[bytes, str, str]:
        """The file of an image, its media type and its name.

        Raises:
            KeyError: there is no such column or row, or the row is no image.
            BadImage: the file is gone, or of no type that browsers show.
        """
        collection = self._collection(column, row)
        data = collection.image(row)
        if isinstance(data, BadImage):
            raise data
        kind = suffix_of(data)  # jpg where it is none of the others
        if kind not in SHOWN or (kind == "jpg" and data[:3] != b"\xff\xd8\xff"):
            raise BadImage("the file is no image of a type that browsers show")
        return data, SHOWN[kind], collection.name(row)

    def thumbnail(self, column: int, row: int) -> bytes:
        """An image of the collection as a small JPEG file.

        Raises:
            KeyError: there is no such column or row, or the row is no image.
            BadImage: the file is gone, or does not decode any more.
        """
        return shrunk(self._collection(column, row).image(row), THUMBNAIL_PX)

    def _collection(self, column: int, row: int) -> Collection:
        if not 0 <= column < len(self.columns):
            raise KeyError(column)
        collection = self.columns[column].collection
        if not 0 <= row < len(collection) or row in collection.bad:
            raise KeyError(row)
        return collection


def shrunk(data: bytes | BadImage, side_px: int) -> bytes:
    """An image as a JPEG file of its pixels alone, whose longer side has at most so many.

    Raises:
        BadImage: it does not decode.
    """
    if isinstance(data, BadImage):
        raise data
    picture = open_picture(data)
    spare = max(picture.width, picture.height) // side_px
    pixels = picture.pixels(next((shrink for shrink in (8, 4, 2) if spare >= shrink), 1))
    return small_jpeg(Image.fromarray(pixels), side_px)


@torch.inference_mode()
def _embedded(model: OpenModel, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Unit rows (q, D) of images (q, S, S, 3), as `embed` makes them; weights of the adaptor sets (q, L, N), if any.

    Rows that are not finite are zero.
    """
    what = f"a batch of {pluralize(len(pixels), 'query', 'queries')}"
    with naming_lack_of_memory(what, "lower --batch-size"):
        z = model.model(to_images(pixels, model.device))
    z = torch.where(z.isfinite().all(1, keepdim=True), z, torch.zeros_like(z))
    rows = to_grid(F.normalize(z, dim=1)).cpu().numpy()
    if not isinstance(model.model, Grappa) or not model.has_adaptors:
        return rows, None
    return rows, model.model.last_attention().float().cpu().numpy()


def _hits(collection: Collection, found: Found, number: int) -> tuple[Hit, ...]:
    pairs = zip(found.rows[number].tolist(), found.cosines[number].tolist(), strict=True)
    return tuple(Hit(row, collection.name(row), cosine) for row, cosine in pairs)


def open_indexes(
    folders: Sequence[str],
    model: str | None,
    device: str,
    *,
    trust_modules: bool | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Searcher:
    """Indexes of the same images under one or two models, a column each.

    Args:
        model: where the model of the last index lies now, if that is elsewhere.

    Raises:
        ValueError: there is no such index, its model is gone, or it holds no image.
    """
    columns = []
    for number, folder in enumerate(folders):
        index = open_index(folder, device=device_of(device))
        if index.faiss is None:
            log(describe_exact())
        given = model if number == len(folders) - 1 else None
        opened = index.open_model(given, device, trust_modules=trust_modules)
        columns.append(Column(opened, index.collection, index.nearest, index.faiss is None))
    return _checked(columns)


def open_columns(embedder: Embedder, images: Sequence[str], keep: Path | None) -> Searcher:
    """Images under the backbone of a model and under the model itself; a backbone alone has one column.

    Args:
        images: that are embedded here, as of `open_collection`, by both models.
        keep: a folder for the embeddings; each model has a folder of its own in it.

    Raises:
        ValueError: there are no images, or none that can be read.
    """
    model = embedder.model
    models = [model.backbone(), model] if model.has_adaptors else [model]
    columns = []
    for one in models:
        folder = None if keep is None else keep / f"{one.variant}-{one.sha256[:12]}"
        with_model = replace(embedder, model=one)
        collection = open_collection(images, lambda found=with_model: found, keep=folder)  # type: ignore[misc]
        columns.append(Column(one, collection))
    return _checked(columns)


def _checked(columns: Sequence[Column]) -> Searcher:
    for collection in (column.collection for column in columns):
        if len(collection) == len(collection.bad):
            raise ValueError(f"there is nothing to search: none of {len(collection)} images could be read")
    return Searcher(tuple(columns))
