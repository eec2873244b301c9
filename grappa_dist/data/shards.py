"""Images in WebDataset tars, read by row id. A row id is the position in the concatenation of the shards."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from grappa_dist.artifacts import packed_texts, unpacked_texts
from grappa_dist.bucket import bucket_of, here
from grappa_dist.checksums import map_rows
from grappa_dist.data.block_cache import BlockFile, CacheSettings, ReadAt, fetchers, open_blocks
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.discovery import Index, find_shards
from grappa_dist.data.index import (
    COMMITTED,
    DAMAGED,
    REFUSED,
    REMADE,
    OpenFile,
    Shard,
    check_places,
    read_rows,
    refusal,
)
from grappa_dist.data.index_cache import rows_are_whole
from grappa_dist.data.remote import RemoteObject
from grappa_dist.data.remote_index import RemoteRows
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.data.tars import key_at, sibling_at
from grappa_dist.files import unique
from grappa_dist.object_store import is_remote
from grappa_dist.storage import open_to_read

_FETCHING = [threading.Lock() for _ in range(64)]  # by shard: threads that need the same index wait for one fetch
_LARGEST_TEXT = 2**16  # bytes of another member that is read as a label
_LARGEST_JSON = 2**24  # bytes of a JSON member: a name in a tar has 2^20 bytes at most, six digits for each


_SUMS: dict[str, bool] = {}  # whether there is such a file of checksums
_CHECKED_AT_ONCE = 8


class BadLabels(ValueError):
    """The JSON member of an image cannot be used; the message names shard and key."""


class ChangedImage(ValueError):
    """An image has other bytes than when its features were made."""


@dataclass(frozen=True)
class ImageShards:
    """Handle on shards of images: small, picklable, and read from any thread or process.

    Attributes:
        sums: of each shard a file with the xxh3 of every image, (P,) uint64, 0: unknown; it need not exist yet. What is
            read is held against it.
        record: (rows,) uint64, gets the xxh3 of every image that is read.
    """

    shards: tuple[Shard, ...]
    indexes: tuple[Index, ...] = field(compare=False, repr=False)
    cache: CacheSettings = field(default=CacheSettings(), compare=False, repr=False)  # of what is read from remote ones
    sums: tuple[str, ...] = field(default=(), compare=False, repr=False)
    record: NDArray[np.uint64] | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def open(
        paths: Sequence[str | os.PathLike[str]],
        index_dir: str | os.PathLike[str] | None,
        cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen
        *,
        write: bool = True,
        on_read: Callable[[], object] = lambda: None,
        log: Callable[[str], object] = lambda line: None,
    ) -> ImageShards:
        """The shards of folders, tars or glob patterns, here or on a remote store, in that order and by name in each.

        A folder that the writer finished brings its index; other tars are read from end to end and indexed into
        `index_dir` once, or, with None or without `write`, into memory and nothing is written.

        Args:
            on_read: called, by any of several threads, for each tar that had to be read to the end.
            log: called with a line for what is passed over.
        """
        folder = None if index_dir is None else Path(index_dir)
        found = find_shards(paths, folder, cache, write=write, on_read=on_read, log=log)
        return ImageShards(tuple(shard for shard, _ in found), tuple(index for _, index in found), cache)

    def __reduce__(self) -> tuple[Any, ...]:
        """As few bytes: every rank of a job is sent it, and unpacks it when it begins."""
        return _unpacked, (*_packed(self.shards, self.indexes), self.cache, packed_texts(self.sums), self.record)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row id of every shard and, last, the number of rows: (shards + 1,)."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """One name for the content of all shards in their order."""
        return hashlib.sha256("\n".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()

    @cached_property
    def _any_remote(self) -> bool:
        return any(is_remote(shard.path) for shard in self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def part(self, shard: int) -> ImageShards:
        """One shard by itself, its rows counted from 0: what a task needs that reads no other."""
        return self._of([shard])

    def some(self, rows: int, seed: int) -> ImageShards:
        """Whole shards, drawn by the seed, with at least `rows` rows; all of them where there are no more."""
        if len(self) <= rows:
            return self
        order = permutation(len(self.shards), Purpose.SOME_SHARDS, seed)
        enough = int(np.searchsorted(np.cumsum(np.diff(self.starts)[order]), rows)) + 1
        chosen = sorted(order[:enough].tolist())
        return self._of(chosen)

    def _of(self, chosen: Sequence[int]) -> ImageShards:
        sums = tuple(self.sums[i] for i in chosen) if self.sums else ()
        return ImageShards(
            tuple(self.shards[i] for i in chosen), tuple(self.indexes[i] for i in chosen), self.cache, sums
        )

    def shard_rows(self, shard: int) -> range:
        """Row ids of one shard."""
        return range(int(self.starts[shard]), int(self.starts[shard + 1]))

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, position inside it) of a row id."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, int(row) - int(self.starts[shard])

    def index(self, shard: int) -> NDArray[Any]:
        """Places of one shard's images, (P,) of ROW, mapped from its index file."""
        return _rows_of(self.indexes[shard], self.shards[shard])

    def image_bytes(self, row: int) -> bytes:
        """The image file of a row, as it lies in the tar.

        Raises:
            BadImage: the index says why the row has none.
            ChangedImage: it has other bytes than when its features were made.
        """
        shard, position = self.locate(row)
        place = self.index(shard)[position]
        if why := refusal(place):
            raise BadImage(f"{why} (byte {place['offset']})")
        if int(place["offset"]) + int(place["size"]) > self.shards[shard].bytes:
            raise BadImage("cut off: the shard ends inside it")
        data = self._read(shard, int(place["offset"]), int(place["size"]))
        if self.record is not None:
            self.record[row] = xxh3_64_intdigest(data)
        if self.sums and (known := _sum_of(self.sums[shard], position)) and xxh3_64_intdigest(data) != known:
            data = self._read(shard, int(place["offset"]), int(place["size"]))  # the first read may have been at fault
            self._compare(row, data, known)
        return data

    def _compare(self, row: int, data: bytes, known: int) -> None:
        found = xxh3_64_intdigest(data)
        if found != known:
            raise ChangedImage(
                f"{self.where(row)}: its bytes are not those that its features were made of (xxh3 {found:016x}, was "
                f"{known:016x}): the tar was damaged, or changed while its size and times stayed. Restore it from "
                f"where it came. If that was on purpose, make its shards again, or remove the {COMMITTED} beside it"
            )

    def check_images(self) -> int:
        """Reads all images whose checksum is known, and holds them against it; how many these are.

        Raises:
            ChangedImage: one has other bytes than when its features were made.
        """
        checked = 0
        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            for shard, path in enumerate(self.sums):  # one by one: a list of all rows may not fit into memory
                rows = [row for position, row in enumerate(self.shard_rows(shard)) if _sum_of(path, position)]
                checked += sum(1 for _ in pool.map(self._image_or_why, rows))
        return checked

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The image files of some rows, or why one is bad, in their order; remote ones are requested in parallel."""
        if self._any_remote:
            return fetchers(self.cache).map(self._image_or_why, rows)
        return map(self._image_or_why, rows)

    def _image_or_why(self, row: int) -> bytes | BadImage:
        try:
            return self.image_bytes(row)
        except BadImage as why:
            return why

    def labels(self, row: int) -> dict[str, Any] | None:
        """The JSON member of a row, or None without one; only `stages/ground_truth.py` asks for it.

        Raises:
            BadLabels: it is no JSON object.
        """
        shard, position = self.locate(row)
        if (size := int(self.index(shard)[position]["json_size"])) > _LARGEST_JSON:
            raise BadLabels(f"{self.where(row)}: its JSON member has {size} bytes; {_LARGEST_JSON} are read at most")
        text = self._json_member(row)
        if text is None:
            return None
        try:
            labels = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise BadLabels(f"{self.where(row)}: its JSON member does not parse: {error}") from None
        if not isinstance(labels, dict):
            raise BadLabels(f"{self.where(row)}: its JSON member is {type(labels).__name__}, expected an object")
        return labels

    def name(self, row: int) -> str:
        """The name of a row's file before it came into the shard, `name` of its JSON member; "" where there is none.

        A name that was not UTF-8 has surrogates in place of the bytes, as names in Python do.
        """
        text = self._json_member(row)
        try:
            content = {} if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return ""
        name = content.get("name") if isinstance(content, dict) else None
        return name if isinstance(name, str) else ""

    def text(self, row: int, suffix: str) -> str:
        """The text of the file of a suffix beside a row's image; "" where there is none.

        Raises:
            BadLabels: it is no UTF-8, or too large.
        """
        shard, position = self.locate(row)
        if refusal(self.index(shard)[position]):
            return ""
        start, offset = self._ends_before(shard, position), int(self.index(shard)[position]["offset"])
        with self._opened(shard) as file:
            place = sibling_at(file, self.shards[shard].bytes, start, offset, suffix)
        if place is None:
            return ""
        if place[1] > _LARGEST_TEXT:
            raise BadLabels(f"{self.where(row)}: its {suffix} has {place[1]} bytes; {_LARGEST_TEXT} are read at most")
        try:
            return self._read(shard, *place).decode()
        except UnicodeDecodeError:
            raise BadLabels(f"{self.where(row)}: its {suffix} is no UTF-8") from None

    def _ends_before(self, shard: int, position: int) -> int:
        """Where the image before a row ends; 0 for the first."""
        rows, before = self.index(shard), position - 1
        while before >= 0 and refusal(rows[before]):  # such a row does not have its end
            before -= 1
        return 0 if before < 0 else int(rows["offset"][before]) + int(rows["size"][before])

    @contextmanager
    def _opened(self, shard: int) -> Iterator[IO[bytes]]:
        opened = self._file(shard)
        if isinstance(opened, BlockFile):
            yield cast(IO[bytes], ReadAt(opened))
            return
        with open_to_read(here(Path(self.shards[shard].path))) as file:
            yield file

    def _json_member(self, row: int) -> bytes | None:
        """The bytes of a row's JSON member; None where there is none, or too large a one."""
        shard, position = self.locate(row)
        place = self.index(shard)[position]
        offset, size = int(place["json_offset"]), int(place["json_size"])
        if not 0 < size <= _LARGEST_JSON or offset + size > self.shards[shard].bytes:
            return None
        return self._read(shard, offset, size)

    def key(self, row: int) -> str:
        """The name of a row in its tar, without suffix; "" for the place from which on a tar is damaged."""
        shard, position = self.locate(row)
        rows = self.index(shard)
        if refusal(rows[position]) == REFUSED[DAMAGED]:
            return ""
        with self._opened(shard) as file:
            start, offset = self._ends_before(shard, position), int(rows["offset"][position])
            return key_at(file, self.shards[shard].bytes, start, offset)

    def called(self, row: int) -> str:
        """The name of a row's file; where there is none, shard and key, as keys of several shards may be the same."""
        return self.name(row) or f"{self.shards[self.locate(row)[0]].name}: {self.key(row)}"

    def where(self, row: int) -> str:
        """Shard and key of a row, and the name of its file where it is known, for messages."""
        key, name = self.key(row), self.name(row)
        image = f": image {key!r:.300}" + (f" ({name!r:.300})" if name else "")
        return self.shards[self.locate(row)[0]].path + (image if key else "")

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        return self._file(shard).read(offset, size)

    def _file(self, shard: int) -> OpenFile | BlockFile:
        tar = self.shards[shard]
        if is_remote(tar.path):
            return open_blocks(RemoteObject(tar.path, tar.bytes, tar.version), self.cache)
        return _opener()(tar)


def _packed(shards: Sequence[Shard], indexes: Sequence[Index]) -> tuple[bytes, bytes, dict[int, Any], dict[int, Any]]:
    """Texts and numbers of all shards, what few of them have besides, and indexes in memory."""
    texts = [text for s in shards for text in (s.name, s.path, s.fingerprint, s.version)]
    texts += [index if isinstance(index, str) else getattr(index, "local", None) or "" for index in indexes]
    texts += [getattr(index, "url", "") for index in indexes]
    numbers = np.array([(s.rows, s.bytes, s.ignored) for s in shards], np.int64)
    more = {i: (s.missing, s.others) for i, s in enumerate(shards) if s.missing.images or s.others}
    in_memory = {i: index for i, index in enumerate(indexes) if isinstance(index, np.ndarray)}
    return packed_texts(texts), numbers.tobytes(), more, in_memory


def _unpacked(
    packed: bytes,
    numbers: bytes,
    more: dict[int, Any],
    in_memory: dict[int, Any],
    *others: Any,
) -> ImageShards:
    counts = np.frombuffer(numbers, np.int64).reshape(-1, 3).tolist()
    texts, n = unpacked_texts(packed), len(counts)
    shards, indexes = list[Shard](), list[Index]()
    for i, (rows, size, ignored) in enumerate(counts):
        name, path, fingerprint, version = texts[4 * i : 4 * i + 4]
        shards.append(Shard(name, path, rows, size, fingerprint, ignored, version, *more.get(i, ())))
        local, url = texts[4 * n + i], texts[5 * n + i]
        indexes.append(in_memory[i] if i in in_memory else RemoteRows(url, local or None) if url else local)
    cache, sums, record = others
    return ImageShards(tuple(shards), tuple(indexes), cache, unpacked_texts(sums), record)


@cache
def _opener() -> Callable[[Shard], OpenFile]:
    """`_open` with a cache: of 128 tars, or for a quarter of the files that this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return lru_cache(maxsize=128 if limit == resource.RLIM_INFINITY else min(128, limit // 4))(_open)


def _open(shard: Shard) -> OpenFile:
    path = Path(shard.path)
    listed = None if bucket_of(path) is not None else (shard.bytes, shard.version)  # each machine has its own copy
    return OpenFile(here(path), listed if shard.version else None)


def _sum_of(path: str, position: int) -> int:
    """The recorded xxh3 of an image; 0: unknown."""
    if not _is_there(path):
        return 0
    return int(map_rows(path, None)[position])


def _is_there(path: str) -> bool:
    if path not in _SUMS:
        found = here(Path(path)).exists()
        if not found and not os.path.exists(os.path.dirname(path)):
            return False  # the features are not finished, and may have it later
        _SUMS[path] = found  # finished features of an earlier version have none
    return _SUMS[path]


def _rows_of(index: Index, shard: Shard) -> NDArray[Any]:
    if isinstance(index, RemoteRows):
        with _FETCHING[hash(index.url) % len(_FETCHING)]:
            return _map(index, shard)
    return index if isinstance(index, np.ndarray) else _map(index, shard)


@lru_cache(maxsize=256)
def _map(index: str | RemoteRows, shard: Shard) -> NDArray[Any]:
    if isinstance(index, RemoteRows):
        return index.load(shard)
    with open_to_read(here(Path(index))) as file:
        if index != f"{shard.path}.npy":  # it is named by the fingerprint of its tar
            if not rows_are_whole(Path(index), write=False):
                raise ValueError(f"{index}: damaged since the run began{REMADE}")
            return read_rows(file, shard, index, remedy=REMADE)
        rows = read_rows(file, shard, index)
    check_places(rows, shard, _opener()(shard), index)
    return rows
