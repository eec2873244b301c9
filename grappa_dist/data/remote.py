"""Objects on s3://, gs:// and http(s)://: listed, and read by ranges, through fsspec. Nothing here writes.

The library reads credentials, endpoints and proxies (environment, configuration files); none is logged.

Stores fail now and then. What may pass (500, 503 and the like, timeouts, broken connections, answers that are cut off
or hold other bytes than those asked for) is asked for again, ATTEMPTS times in all with growing pauses, and is then a
StoreUnavailable, an OSError: another attempt of the job, or of the run, may find the store well. All else is a
ValueError that names the object: it is missing or refused, or it is not the one that was listed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from grappa_dist.data.entries import expand_braces
from grappa_dist.object_store import (
    ATTEMPTS,
    BrokenAnswer,
    StoreUnavailable,
    check_url,
    describe,
    is_http,
    is_missing,
    is_passing,
    library_errors,
    patiently,
    status_of,
    store_of,
    whole,
)
from grappa_dist.storage import Result

_HEADERS_AT_ONCE = 32


@dataclass(frozen=True)
class RemoteObject:
    """One object as it was listed: `version` is its ETag, else its generation or its time of change, else empty."""

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def folder(self) -> str:
        return self.url.rpartition("/")[0]


class Traffic:
    """What this process has read from remote stores: ranges and whole small objects, with their bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = self.bytes = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.requests += 1
            self.bytes += num_bytes


TRAFFIC = Traffic()


def is_folder(url: str) -> bool:
    return not url.endswith(".tar") and not set("*[{") & set(url)


def list_tars(entry: str) -> list[RemoteObject]:
    """The tars that one entry names, by name: a folder, a tar, a pattern, or a range such as x-{000..127}.tar."""
    url = check_url(entry)
    if (names := expand_braces(url)) != [url]:
        return objects_at(names)
    if "*" in url or "[" in url:
        found = _attempt(url, "listing", lambda fs, path: fs.glob(path, detail=True)).values()
    elif url.endswith(".tar"):
        return objects_at([url])
    else:
        found = _attempt(url, "listing", lambda fs, path: fs.ls(path, detail=True), missing=[])
    fs, _ = store_of(url)
    infos = {fs.unstrip_protocol(info["name"]): info for info in found if info["type"] == "file"}
    tars = sorted(name for name in infos if name.endswith(".tar"))
    if any(infos[name].get("size") is None for name in tars):  # an HTML listing has names alone
        return objects_at(tars)
    return [_object(name, infos[name]) for name in tars]


def objects_at(urls: Iterable[str]) -> list[RemoteObject]:
    """Size and version of some objects, asked for in parallel."""

    def of(url: str) -> RemoteObject:
        return _object(url, _attempt(url, "its headers", lambda fs, path: fs.info(path)))

    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return list(pool.map(of, urls))


def fetch_whole(url: str) -> bytes | None:
    """All bytes of a small object, or None where there is none."""
    data = _attempt(url, "all of it", whole, missing=None)
    if data is not None:
        TRAFFIC.add(len(data))
    return data


class RemoteFile:
    """An object read by ranges; safe from many threads. It must still be the one that was listed."""

    def __init__(self, source: RemoteObject) -> None:
        self.source = source
        self._file: Any = None
        self._lock = threading.Lock()

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes of a range, in one request."""
        if end == start:
            return b""
        data: bytes = _attempt(self.source.url, f"bytes {start}-{end - 1}", lambda *_: self._fetch(start, end))
        TRAFFIC.add(len(data))
        return data

    def _fetch(self, start: int, end: int) -> bytes:
        file = self._opened()
        data: bytes = file(start, end) if isinstance(file, _HttpRanges) else file._fetch_range(start, end)
        if len(data) != end - start:
            raise BrokenAnswer(f"{len(data)} of {end - start} bytes came")
        return data

    def _opened(self) -> Any:
        """The library's file, which refuses another version where the store can (If-Match)."""
        with self._lock:
            if self._file is None:
                fs, path = store_of(self.source.url)
                if is_http(self.source.url):
                    found = fs.info(path)
                    file: Any = _HttpRanges(fs, path, self.source, str(found.get("ETag", "")))
                else:
                    file = fs.open(path, cache_type="none")
                    found = file.details
                    if found.get("ETag") and hasattr(file, "read_kw"):  # s3fs: held by the store, and by us
                        file.read_kw = {**file.read_kw, "IfMatch": found["ETag"]}
                now = _object(self.source.url, found)
                if now != self.source:
                    raise ValueError(
                        f"{self.source.url}: its size and version are {now.size}, {now.version or 'none'}, but "
                        f"{self.source.size}, {self.source.version or 'none'} when it was indexed; the shard changed"
                    )
                self._file = file
            return self._file


@dataclass(frozen=True)
class _HttpRanges:
    """Ranges of an object on http(s), each held against what was listed: fsspec would take any answer of the length."""

    fs: Any
    path: str
    source: RemoteObject
    tag: str  # its ETag, with quotes

    def __call__(self, start: int, end: int) -> bytes:
        from fsspec.asyn import sync

        return bytes(sync(self.fs.loop, self._get, start, end))

    async def _get(self, start: int, end: int) -> bytes:
        options = dict(self.fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if self.tag.startswith('"'):
            headers["If-Match"] = self.tag
        session = await self.fs.set_session()
        async with session.get(self.fs.encode_url(self.path), headers=headers, **options) as answer:
            if answer.status != 416:
                answer.raise_for_status()
            self._compare(answer.status, answer.headers, start, end)
            data: bytes = await answer.read()
            return data

    def _compare(self, status: int, headers: Mapping[str, str], start: int, end: int) -> None:
        """Raises ValueError where the answer is of another object, BrokenAnswer where it is of another range."""
        if status == 416:
            raise self._changed(f"status 416, no such bytes, but it had {self.source.size}")
        if status != 206:
            raise ValueError(
                f"{self.source.url}: status {status} for bytes {start}-{end - 1}; the server has no ranges, and shards "
                "are read by ranges: serve them by one that does"
            )
        if self.tag and headers.get("ETag", self.tag) != self.tag:
            raise self._changed(f"its version is {headers['ETag']}, but was {self.tag}")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if found and (int(found[1]), int(found[2])) != (start, end - 1):
            raise BrokenAnswer(f"bytes {found[1]}-{found[2]} came")
        if found and found[3] not in ("*", str(self.source.size)):
            raise self._changed(f"it has {found[3]} bytes, but had {self.source.size}")

    def _changed(self, how: str) -> ValueError:
        return ValueError(f"{self.source.url}: {how} when it was indexed; the shard changed")


def _attempt(url: str, what: str, ask: Callable[[Any, str], Result], **missing: Any) -> Any:
    """What `ask(file system, path)` returns; errors name the object and what was asked for.

    Args:
        missing: `missing=value` is returned where the object does not exist.
    """
    try:
        return patiently(lambda: ask(*store_of(url)))
    except library_errors() as error:
        if isinstance(error, ValueError) and str(error).startswith(url):
            raise
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if is_passing(error):
            raise StoreUnavailable(f"{url}: {what} cannot be read in {ATTEMPTS} attempts: {describe(cause)}") from error
        if is_missing(cause):
            if missing:
                return missing["missing"]
            raise ValueError(f"{url}: not there (asked for {what})") from None
        status = status_of(error) or status_of(error.__cause__)
        if status in (412, 416) or type(cause).__name__ == "FileExpired":  # s3fs has it
            raise ValueError(f"{url}: {what}: another object than was indexed; the shard changed") from None
        raise ValueError(f"{url}: {what} cannot be read: {describe(cause)}") from error


def _object(url: str, info: dict[str, Any]) -> RemoteObject:
    if info.get("size") is None:
        raise ValueError(f"{url}: the server does not say its size; expected a Content-Length")
    found = (info.get(key) for key in ("ETag", "etag", "generation", "Last-Modified"))
    version = next((str(value) for value in found if value), "")
    return RemoteObject(url, int(info["size"]), version.removeprefix("W/").strip('"'))
