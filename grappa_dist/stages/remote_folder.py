"""A folder on an object store that we write to; every failure says what was asked of which URL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from grappa_dist.data.remote import check_url, library_errors, store_of
from grappa_dist.files import sync

_IN_FLIGHT = 8


class RemoteFolder:
    """Objects below a URL, by their names in it.

    Raises:
        ValueError: in every method, when the store does not do what it is asked.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._fs, self._path = store_of(self.url)

    def names(self) -> set[str]:
        found = self._call("listed", lambda: self._fs.find(self._path))
        return {name.removeprefix(self._path).strip("/") for name in found}

    def read(self, name: str) -> bytes:
        data: bytes = self._call(f"{name} read", lambda: self._fs.cat_file(self._at(name)))
        return data

    def write(self, name: str, data: bytes) -> None:
        self._call(f"{name} written", lambda: self._fs.pipe_file(self._at(name), data))

    def get(self, name: str, path: Path) -> None:
        self._call(f"{name} read", lambda: self._fs.get_file(self._at(name), str(path)))

    def put(self, path: Path, name: str) -> None:
        self._call(f"{name} written", lambda: self._fs.put_file(str(path), self._at(name)))

    def remove(self, names: Iterable[str]) -> None:
        """One after the other, in this order; those that are not there are no error."""
        for name in names:
            self._call(f"{name} removed", partial(self._remove, name))

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def fetch(self, objects: Mapping[str, str], sizes: Mapping[str, int], target: Path, *, said_by: str) -> None:
        """A folder of files, each from its object; it appears by one rename.

        Args:
            said_by: the object that names the files and their sizes, for errors.

        Raises:
            ValueError: a file would lie outside of the folder, or has another size; nothing appears.
        """
        fresh = target.with_name(f"{target.name}.fetched")
        shutil.rmtree(fresh, ignore_errors=True)
        for file in objects:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise ValueError(f"{self.url}/{said_by}: names {file!r}, outside of its folder")
            (fresh / file).parent.mkdir(parents=True, exist_ok=True)
        each(objects, lambda file: self.get(objects[file], fresh / file))
        for file, size in sizes.items():
            if (found := (fresh / file).stat().st_size) != size:
                raise ValueError(
                    f"{self.url}/{objects[file]}: {found} bytes, {said_by} says {size}; remove {self.url}/{said_by} to "
                    "have it made again"
                )
        os.rename(fresh, target)
        sync(target.parent)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _call(self, what: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except library_errors() as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"mirror={self.url}: cannot be used ({what}): {type(error).__name__}: {said}") from error


def each(names: Iterable[str], do: Callable[[str], None]) -> None:
    """Some requests in flight at a time; the first failure is raised."""
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        list(pool.map(do, names))
