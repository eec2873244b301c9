"""Embeddings that are searched: made before by `embed`, or made here of images and kept where that is asked for.

On disk they are as `embed_images` of export.py writes them: `embeddings.json` lists files with the rows, keys, names
and bad positions of each part, with their checksums. Shapes: n rows of a part, D channels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from xxhash import xxh3_64_hexdigest

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import ImageShards
from grappa_dist.export import KEYS_FILE, LIST_FILE, NAMES_FILE
from grappa_dist.files import Sum, lock_file, map_array, read_json, save_array, write_json
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.images import ImageFiles, open_images
from grappa_dist.retrieval.opening import OpenModel
from grappa_dist.stages.bad_rows import BAD_FILE
from grappa_dist.stages.embed import ROWS_FILE

STAMPS_FILE = "stamps.json"  # size and time of change of every file, so that only new and changed ones are embedded
_AT_ONCE = 8  # files that are looked at: many small ones, which take long on a network file system
_CHUNK = 1024  # files whose state a thread asks for at a time
_INSIDE = re.compile(r"images-[0-9a-f]{16}")  # folders that are made here
LOCK_FILE = "embeddings.lock"  # where embeddings are kept: held by the process that writes them


@dataclass(frozen=True)
class Part:
    """Embeddings of some images, in order."""

    rows: NDArray[np.float32] = field(repr=False)  # (n, D), zero where bad
    bad: Mapping[int, str] = field(repr=False)  # why, by position
    read_names: Callable[[], Sequence[str]] = field(repr=False)
    image: Callable[[int], bytes | BadImage] = field(repr=False)  # the file at a position
    first: int = 0  # where in its shard the first of them lies

    @cached_property
    def names(self) -> Sequence[str]:
        return self.read_names()


@dataclass(frozen=True)
class Collection:
    """All parts; a row id is the position in their concatenation."""

    parts: tuple[Part, ...]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(part.rows) for part in self.parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def rows(self) -> list[NDArray[np.float32]]:
        return [part.rows for part in self.parts]

    @cached_property
    def bad(self) -> dict[int, str]:
        """Why rows are no embeddings, by row id."""
        starts = self.starts.tolist()
        return {starts[i] + place: why for i, part in enumerate(self.parts) for place, why in part.bad.items()}

    def name(self, row: int) -> str:
        part, place = self._locate(row)
        return part.names[place]

    def image(self, row: int) -> bytes | BadImage:
        """The file of a row, or why there is none."""
        part, place = self._locate(row)
        return part.image(place)

    def _locate(self, row: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - int(self.starts[number])


def open_collection(
    paths: Sequence[str], embedder: Callable[[], Embedder], *, keep: Path | None = None, any_model: bool = False
) -> Collection:
    """The embeddings of a folder that `embed` made, or of images, which are embedded here.

    Args:
        embedder: the model, opened when it is needed.
        keep: a folder for the embeddings of images, which are reused where the files are as they were.
        any_model: whether embeddings of any model will do, since nothing else is compared with them.

    Raises:
        ValueError: there are no images; or the embeddings are damaged, or of another model; or `keep` is in use, or a
            folder of something else, or is given although the embeddings are there.
    """
    if len(paths) == 1 and (Path(paths[0]).expanduser() / LIST_FILE).exists():
        folder = Path(paths[0]).expanduser()
        if keep is not None:
            raise ValueError(f"{folder} holds embeddings, which are searched as they are; --keep is for images")
        return stored(folder, None if any_model else embedder().model)
    model = embedder()
    images = open_images(paths, log=model.console.log)
    if keep is not None:
        with _kept_in(keep):
            return _kept(images, model, keep)
    found = model.embed(images)
    return Collection((Part(found.rows, found.bad, lambda: names_of(images), lambda row: _read(images, row)),))


def names_of(images: Images) -> list[str]:
    """The names of files; where a shard has none, shard and key."""
    name = images.called if isinstance(images, ImageShards) else images.name
    return [name(row) for row in range(len(images))]


def _read(images: Images, row: int) -> bytes | BadImage:
    return next(iter(images.images([row])))


def stored(folder: Path, model: OpenModel | None) -> Collection:
    """The embeddings of a folder, their files held against the checksums that are listed.

    Args:
        model: that they must be of; None: any.
    """
    listing = read_list(folder / LIST_FILE)
    if model is not None:
        check_model(folder, listing, model)
    return Collection(tuple(part for parts in listed_parts(folder / LIST_FILE, folder, listing) for part in parts))


def listed_parts(path: Path, folder: Path, listing: Mapping[str, Any]) -> list[tuple[Part, ...]]:
    """The embeddings of each entry of a list, its files held against the checksums: what lies between rows that are
    gone is a part.

    Args:
        path: of the list, for messages.
        folder: that the paths in the list begin at.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(partial(_stored_parts, folder), listing["shards"]))
    dims = {part.rows.shape[1] for parts in found for part in parts}
    if len(dims) != 1:
        raise damaged(path, f"lists rows of {sorted(dims) or 'no'} channels")
    return found


def read_list(path: Path) -> dict[str, Any]:
    """The list of a folder of embeddings: `shards`, and what they are of."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise damaged(path, str(error).removeprefix(f"{path}: ")) from None
    if not isinstance(found, dict) or not isinstance(found.get("shards"), list):
        raise damaged(path, "is no list of embeddings")
    for entry in found["shards"]:
        _check_entry(path, entry)
    return found


def damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: {why}: the embeddings are damaged; run the command that made them again")


def check_model(folder: Path, listing: Mapping[str, Any], model: OpenModel) -> None:
    """Raises ValueError for embeddings of other weights, or in another precision, which are not to be mixed."""
    theirs, gallery = listing.get("model_sha256"), listing.get("gallery")
    if theirs == model.sha256 and gallery == model.gallery:
        return
    of = f"{listing.get('model')}{f', gallery {gallery}' if gallery else ''}, sha256 {str(theirs)[:12]}"
    raise ValueError(
        f"{folder}: these embeddings are of another model ({of}) than {model.describe()}; name the model that made "
        "them, in their precision (backbone.precision), or embed the images with this one"
    )


def _inner(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise ValueError("expected a path inside of the folder")
    return path


_Inner = Annotated[str, AfterValidator(_inner)]
_Place = Annotated[int, Field(ge=0, lt=2**48)]  # so that sums of many are whole numbers of 64 bits


class _Entry(BaseModel):
    """What an entry of a list is, which may be of anyone."""

    model_config = ConfigDict(strict=True, extra="ignore")
    shard: str
    source: str | None = None
    images: _Place
    rows: _Inner
    keys: _Inner
    bad: _Inner
    names: _Inner | None = None
    tasks: _Inner | None = None
    stamps: _Inner | None = None
    xxh3: dict[str, str | None] = Field(default_factory=dict)  # none in lists of earlier versions
    gone: list[_Place] = Field(default_factory=list)
    first_id: _Place = 0  # in the list of an index


_TEXTS = TypeAdapter(list[str | None], config=ConfigDict(strict=True))
_REASONS = TypeAdapter(dict[_Place, str])


def _check_entry(path: Path, entry: object) -> None:
    """Raises ValueError, which names the list, for an entry that is not as one is written."""
    try:
        found = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        why = f"has no {where!r}" if first["type"] == "missing" else f"is not as it is written: {where}: {first['msg']}"
        raise damaged(path, f"is no list of embeddings (an entry {why})") from None
    if max(found.gone, default=-1) >= found.images:
        raise damaged(
            path, f"is no list of embeddings (an entry of {found.images} images lacks number {max(found.gone)})"
        )


def texts_in(path: Path, count: int) -> list[str | None]:
    """Names or keys of so many images."""
    try:
        found = _TEXTS.validate_python(read_json(path))
    except ValidationError:
        raise damaged(path, "is no list of texts") from None
    if len(found) != count:
        raise damaged(path, f"has {len(found)} texts, expected {count}")
    return found


def _reasons_in(path: Path, count: int) -> dict[int, str]:
    """Why some of so many images are bad, by position."""
    try:
        found = _REASONS.validate_python(read_json(path))
    except ValidationError:
        raise damaged(path, "does not give reasons by position") from None
    if max(found, default=-1) >= count:
        raise damaged(path, f"has a reason for position {max(found)} of {count}")
    return found


def _stored_parts(folder: Path, entry: Mapping[str, Any]) -> tuple[Part, ...]:
    optional = [what for what in ("names", "tasks", "stamps") if entry.get(what) is not None]
    paths = {what: folder / entry[what] for what in ("rows", "keys", "bad", *optional)}
    for what, path in paths.items():
        expected = entry.get("xxh3", {}).get(what)
        if not path.is_file():
            raise damaged(path, "is missing")
        if expected is not None and Sum.of(path).xxh3 != expected:
            raise damaged(path, "does not hold what was written")
    try:
        rows = map_array(paths["rows"], "c") if entry["images"] else np.zeros((0, 1), np.float32)
    except (ValueError, EOFError) as error:
        raise damaged(paths["rows"], f"is no array: {error}") from None
    if rows.ndim != 2 or rows.dtype != np.float32 or len(rows) != entry["images"]:
        raise damaged(paths["rows"], f"has rows {rows.shape} of {rows.dtype}, expected {entry['images']} of float32")
    bad = _reasons_in(paths["bad"], len(rows))

    @cache
    def names() -> list[str]:
        named = texts_in(paths["names"], len(rows)) if "names" in paths else [None] * len(rows)
        keys = texts_in(paths["keys"], len(rows))
        return [name or f"{entry['shard']}: {key}" for name, key in zip(named, keys, strict=True)]

    files = _Files(entry.get("source"), names)
    edges = [-1, *sorted(entry.get("gone", ())), len(rows)]
    whole = Part(rows, bad, names, files)
    return tuple(_between(whole, low + 1, high) for low, high in pairwise(edges) if low + 1 < high)


def _between(whole: Part, low: int, high: int) -> Part:
    """The images of a part from one position up to another."""
    if (low, high) == (0, len(whole.rows)):
        return whole
    bad = {place - low: why for place, why in whole.bad.items() if low <= place < high}
    return Part(
        whole.rows[low:high], bad, lambda: whole.names[low:high], lambda place: whole.image(low + place), first=low
    )


@dataclass(frozen=True)
class _Files:
    """The files of a stored part, where they still lie where they were embedded from."""

    source: str | None  # a folder or a shard; None: not listed
    names: Callable[[], Sequence[str]]

    @cached_property
    def _shard(self) -> ImageShards:
        return ImageShards.open([self.source or ""], None)

    def __call__(self, place: int) -> bytes | BadImage:
        if self.source is None:
            return BadImage("where the image lies is not listed")
        try:
            if self.source.endswith(".tar"):
                return _read(self._shard, place)
            return _read(open_images([os.path.join(self.source, self.names()[place])]), 0)
        except (ValueError, OSError) as error:  # it was moved, or is of another machine
            return BadImage(str(error))


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Holds a folder in which embeddings are kept, which is made unless it is there.

    Raises:
        ValueError: another process holds it, or it has other files.
    """
    try:
        if not any((folder / name).exists() for name in (LIST_FILE, LOCK_FILE)) and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: holds other files; to keep embeddings, expected a new or an empty folder, or one that has "
                "embeddings that were kept"
            )
    except FileNotFoundError:
        folder.mkdir(parents=True)
    except NotADirectoryError:
        raise ValueError(f"{folder}: is a file; to keep embeddings, expected a folder") from None
    try:
        lock = lock_file(folder / LOCK_FILE)
    except BlockingIOError as held:
        raise ValueError(f"{folder}: another process keeps embeddings there{held}; wait for it") from None
    with lock:
        yield


def _kept(images: Images, embedder: Embedder, folder: Path) -> Collection:
    """Embeddings of images that are kept in a folder: what has the name, size and time of before is not made again."""
    if not isinstance(images, ImageFiles):
        raise ValueError("embeddings are kept of folders and lists; of shards, `grappa-dist embed` writes them")
    names, stamps = names_of(images), _stamps_of(images)
    listing = read_list(folder / LIST_FILE) if (folder / LIST_FILE).exists() else {"shards": []}
    before = _reusable(folder, listing, embedder.model)
    known = [before.get(one) for one in zip(names, stamps, strict=True)]
    fresh = np.array([row for row, one in enumerate(known) if one is None], dtype=np.int64)
    made = embedder.embed(images, fresh)
    rows = np.zeros((len(images), made.rows.shape[1]), np.float32)
    rows[fresh] = made.rows
    for row, one in enumerate(known):
        if one is not None:
            rows[row] = one
    if len(fresh) < len(images):
        embedder.console.log(f"{folder}: {len(images) - len(fresh):,} of {len(images):,} images were embedded before")
    if len(fresh) or len(before) != len(images):
        source = str(images.items[0].source.path) if images.items else ""
        _write(folder, rows, _Listed(source, names, stamps, made.bad), embedder.model)
        for old in {entry["shard"] for entry in listing["shards"]} - {_inside(names, stamps, embedder.model)}:
            if _INSIDE.fullmatch(old):  # the list may be of anyone, and must not have any folder removed
                shutil.rmtree(folder / old, ignore_errors=True)
    return Collection((Part(rows, made.bad, lambda: names, lambda row: _read(images, row)),))


def _stamps_of(images: ImageFiles) -> list[str]:
    """By threads, as files may lie on a network file system."""
    chunks = [range(at, min(at + _CHUNK, len(images))) for at in range(0, len(images), _CHUNK)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [stamp for found in pool.map(lambda chunk: [*map(images.stamp, chunk)], chunks) for stamp in found]


def _reusable(folder: Path, listing: Mapping[str, Any], model: OpenModel) -> dict[tuple[str, str], NDArray[np.float32]]:
    """Rows that are kept in a folder, by name and stamp; those that were bad are tried again."""
    if not listing["shards"]:
        return {}
    check_model(folder, listing, model)
    (entry, *others) = listing["shards"]
    if others or "stamps" not in entry:
        raise ValueError(f"{folder}: holds embeddings that `grappa-dist embed` made; name another folder to keep these")
    ((part,),) = listed_parts(folder / LIST_FILE, folder, listing)
    stamps = read_json(folder / entry["stamps"])
    return {
        one: part.rows[place] for place, one in enumerate(zip(part.names, stamps, strict=True)) if place not in part.bad
    }


@dataclass(frozen=True)
class _Listed:
    """What is listed of embeddings that are kept."""

    source: str  # the folder that names begin at
    names: Sequence[str]
    stamps: Sequence[str]
    bad: Mapping[int, str]


def _inside(names: Sequence[str], stamps: Sequence[str], model: OpenModel) -> str:
    """The folder of embeddings of these images by this model."""
    mark = xxh3_64_hexdigest(json.dumps([model.sha256, model.gallery, names, stamps]).encode())
    return f"images-{mark}"


def _write(folder: Path, rows: NDArray[np.float32], listed: _Listed, model: OpenModel) -> None:
    """Writes the files under a name of their own, then the list that names them: a search sees the old or the new."""
    inside = _inside(listed.names, listed.stamps, model)
    files = {"rows": ROWS_FILE, "keys": KEYS_FILE, "names": NAMES_FILE, "bad": BAD_FILE, "stamps": STAMPS_FILE}
    paths = {what: f"{inside}/{name}" for what, name in files.items()}
    save_array(folder / paths["rows"], rows)
    bad = {str(row): why for row, why in listed.bad.items()}
    contents = {"keys": listed.names, "names": listed.names, "bad": bad, "stamps": listed.stamps}
    for what, content in contents.items():
        write_json(folder / paths[what], content)
    xxh3 = {what: Sum.of(folder / path).xxh3 for what, path in paths.items()}
    entry = {"shard": inside, "source": listed.source, "images": len(rows), **paths, "xxh3": xxh3}
    about = {"model": model.variant, "model_sha256": model.sha256, "gallery": model.gallery}
    write_json(folder / LIST_FILE, {**about, "images": len(rows), "shards": [entry]})
