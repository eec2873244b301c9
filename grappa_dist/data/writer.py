"""Writes shards of images: the same images in the same order make the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType

from grappa_dist.data.discovery import committed_index, refuse_other_files
from grappa_dist.data.index import COMMITTED, IMAGE_SUFFIXES, INDEX_VERSION, Shard, entry, index_shard
from grappa_dist.files import save_array, sync, write_json
from grappa_dist.storage import open_to_write

Member = tuple[str, bytes]  # suffix and content


def members(image: bytes, suffix: str, label: str | None, task: str | None, *, name: str | None = None) -> list[Member]:
    """What a row consists of: its image, and its JSON where label, task or the name of its file is given."""
    found = [(suffix.lower(), image)]
    content = {"label": label, "task": task} | ({} if name is None else {"name": name})
    if any(value is not None for value in content.values()):
        found.append(("json", _as_json(content)))
    return found


def _as_json(content: dict[str, str | None]) -> bytes:
    """UTF-8; where a file's name is not, ASCII with an escape for each such byte, which `os.fsencode` undoes."""
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(content).encode()


def member_bytes(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar."""
    return 512 + -(-size // 512) * 512


class TarShard:
    """One tar that is being filled; `finish` gives its index and what it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._file = open_to_write(path)  # whose errors name it, and say what to do
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, row: int, row_members: Iterable[Member]) -> None:
        for ending, data in row_members:
            member = tarfile.TarInfo(f"{row:09d}.{ending}")  # time, owner and group are 0 in a new one
            member.size = len(data)
            self._tar.addfile(member, BytesIO(data))
        self.rows += 1

    def finish(self) -> Shard:
        """The shard, whose bytes are on disk and whose index lies beside it."""
        self._tar.close()
        self._file.close()
        sync(self.path)
        rows, shard = index_shard(self.path)
        assert len(rows) == self.rows, "the index lacks a row"
        save_array(self.path.with_name(f"{shard.name}.npy"), rows)
        return shard

    def close(self) -> None:
        """Ends the writing of a tar that is of no use, unless it is finished."""
        for file in (self._tar, self._file):
            with suppress(OSError):  # of a disk that is still full
                file.close()


class ShardWriter:
    """Fills a folder with tars and their index; the folder appears by one rename when the `with` block ends well.

    A finished folder is never changed. Writing the same shards again leaves it as it is (`reused` is then true);
    writing others is refused at the first shard that differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rows_per_shard: int | None = 1000,
        prefix: str = "shard",
    ) -> None:
        if rows_per_shard is not None and rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self.folder = Path(folder).expanduser().absolute()
        self.rows_per_shard, self.prefix = rows_per_shard, prefix
        self.shards: list[Shard] = []
        self.rows = 0
        self.reused = False
        self._partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        self._tar: TarShard | None = None

    def __enter__(self) -> ShardWriter:
        self._finished = committed_index(self.folder)
        if self._finished is None:
            refuse_other_files(self.folder)
        self._partial.mkdir(parents=True)
        return self

    def write(
        self, image: bytes, suffix: str, label: str | None = None, task: str | None = None, *, name: str | None = None
    ) -> int:
        """Appends an image, and its JSON where label, task or its file's name is given; its row id in this folder."""
        if suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"image {self.rows}: suffix {suffix!r}; expected one of {', '.join(IMAGE_SUFFIXES)}")
        if self._tar is not None and self._tar.rows == self.rows_per_shard:
            self._close_shard()
        if self._tar is None:
            self._tar = TarShard(self._partial / f"{self.prefix}-{len(self.shards):06d}.tar")
        self._tar.add(self.rows, members(image, suffix, label, task, name=name))
        self.rows += 1
        return self.rows - 1

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        shard = self._tar.finish()
        self._tar = None
        if self._finished is not None:
            known = self._finished.get(shard.name)
            if known is None or known[0].fingerprint != shard.fingerprint:
                raise self._other_content()
        self.shards.append(shard)

    def _other_content(self) -> ValueError:
        return ValueError(
            f"{self.folder}: finished, with other shards than these; remove it or write to another folder"
        )

    def _commit(self) -> None:
        self._close_shard()
        if self._finished is not None:
            if len(self._finished) != len(self.shards):
                raise self._other_content()
            self.reused = True
            return
        write_json(
            self._partial / COMMITTED, {"version": INDEX_VERSION, "shards": [entry(shard) for shard in self.shards]}
        )
        self._partial.rename(self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self._partial, ignore_errors=True)
