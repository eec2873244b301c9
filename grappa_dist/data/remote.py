"""Objects on s3://, gs:// and http(s)://: listed, and read by ranges, through fsspec. Nothing here writes.

The library reads credentials, endpoints and proxies (environment, configuration files); none is logged.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

INSTALL = {  # protocol -> what to install
    "s3": "pip install 'grappa-dist[s3]' (s3fs)",
    "gs": "pip install 'grappa-dist[gs]' (gcsfs)",
    "http": "pip install aiohttp",
    "https": "pip install aiohttp",
}
CONNECTIONS = 64  # per process and store; botocore's own limit of 10 would hold back what is in flight
_ATTEMPTS = 5  # of http(s), which fsspec does not repeat; s3fs and gcsfs repeat by themselves
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_HEADERS_AT_ONCE = 32
Result = TypeVar("Result")


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


def is_remote(path: str) -> bool:
    return "://" in path


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def is_folder(url: str) -> bool:
    return not url.endswith(".tar") and not set("*[{") & set(url)


def check_url(url: str) -> str:
    """The URL, without a slash at its end.

    Raises:
        ValueError: another protocol than we read, or a secret in the URL, which is not repeated.
    """
    parts = urlsplit(url)
    if parts.scheme not in INSTALL:
        known = ", ".join(f"{protocol}://" for protocol in INSTALL)
        raise ValueError(f"shards: {parts.scheme}:// is not read; expected one of {known} or a mounted folder")
    if "@" in parts.netloc or (is_http(url) and (parts.query or parts.fragment)):
        raise ValueError(
            f"shards: {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} was given with a user, password "
            "or query; expected a plain URL (credentials belong in the environment, a signed URL would expire)"
        )
    return url.rstrip("/")


def list_tars(entry: str) -> list[RemoteObject]:
    """The tars that one entry names, by name: a folder, a tar, a pattern, or a range such as x-{000..127}.tar."""
    url = check_url(entry)
    if (names := _expanded(url)) != [url]:
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
    data = _attempt(url, "all of it", lambda fs, path: fs.cat_file(path), missing=None)
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
        url, what = self.source.url, f"bytes {start}-{end - 1}"
        if end == start:
            return b""
        data: bytes = _attempt(url, what, lambda *_: self._opened()._fetch_range(start, end))
        TRAFFIC.add(len(data))
        if len(data) != end - start:
            raise ValueError(
                f"{url}: {len(data)} of {end - start} bytes came for {what}; cut off, or the server has no ranges"
            )
        return data

    def _opened(self) -> Any:
        """The library's file, which refuses another version where the store can (If-Match)."""
        with self._lock:
            if self._file is None:
                fs, path = store_of(self.source.url)
                if is_http(self.source.url):
                    found = fs.info(path)
                    strong = {"headers": {"If-Match": found["ETag"]}} if found.get("ETag", "").startswith('"') else {}
                    file = fs.open(path, block_size=1, size=found["size"], cache_type="none", **strong)
                else:
                    file = fs.open(path, cache_type="none")
                    found = file.details
                now = _object(self.source.url, found)
                if now != self.source:
                    raise ValueError(
                        f"{self.source.url}: its size and version are {now.size}, {now.version or 'none'}, but "
                        f"{self.source.size}, {self.source.version or 'none'} when it was indexed; the shard changed"
                    )
                self._file = file
            return self._file


def _attempt(url: str, what: str, ask: Callable[[Any, str], Result], **missing: Any) -> Any:
    """What `ask(file system, path)` returns; transient errors of http(s) are tried again, all others named.

    Args:
        missing: `missing=value` is returned where the object does not exist.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return ask(*store_of(url))
        except library_errors() as error:
            if isinstance(error, ValueError) and str(error).startswith(url):
                raise
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if is_http(url) and attempt + 1 < _ATTEMPTS and _is_transient(cause):
                time.sleep(0.1 * 2**attempt)
                continue
            if _is_missing(cause):
                if missing:
                    return missing["missing"]
                raise ValueError(f"{url}: not there (asked for {what})") from None
            if _status(cause) == 412 or type(cause).__name__ == "FileExpired":  # s3fs has it
                raise ValueError(f"{url}: {what}: another object than was indexed; the shard changed") from None
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise ValueError(f"{url}: {what} cannot be read: {type(cause).__name__}: {reason}") from error
    raise AssertionError("the last attempt returns or raises")


def store_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, one per process, and the path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    protocol = urlsplit(url).scheme
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        configured = conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **configured}
    try:
        found: tuple[Any, str] = url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(f"{url}: {protocol}:// needs a package that is not installed: {INSTALL[protocol]}") from error
    return found


def library_errors() -> tuple[type[BaseException], ...]:
    """What reading may raise: the libraries' errors have no common base class, and only libraries in use are loaded."""
    kinds = [("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")]
    kinds += [("botocore.exceptions", "ClientError"), ("gcsfs.retry", "HttpError")]
    kinds += [("google.auth.exceptions", "GoogleAuthError")]
    loaded = [getattr(sys.modules[module], name) for module, name in kinds if module in sys.modules]
    return (OSError, ValueError, *loaded)


def _status(error: BaseException) -> int | None:
    return getattr(error, "status", None)  # aiohttp's ClientResponseError


def _is_missing(error: BaseException) -> bool:
    code = getattr(error, "response", None) or {}  # botocore's ClientError
    gone = isinstance(code, dict) and code.get("Error", {}).get("Code") in ("NoSuchBucket", "NoSuchKey")
    return gone or isinstance(error, FileNotFoundError) or _status(error) == 404


def _is_transient(error: BaseException) -> bool:
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _TRANSIENT_STATUS
    return isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | TimeoutError)


def _object(url: str, info: dict[str, Any]) -> RemoteObject:
    if info.get("size") is None:
        raise ValueError(f"{url}: the server does not say its size; expected a Content-Length")
    found = (info.get(key) for key in ("ETag", "etag", "generation", "Last-Modified"))
    version = next((str(value) for value in found if value), "")
    return RemoteObject(url, int(info["size"]), version.removeprefix("W/").strip('"'))


def _expanded(url: str) -> list[str]:
    """The URLs of x-{000..127}.tar, as WebDataset writes them."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if match is None:
        return [url]
    first, last = match[1], match[2]
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise ValueError(f"shards: {url} counts from {first} to {last}, which names nothing")
    return [
        whole for n in numbers for whole in _expanded(f"{url[: match.start()]}{n:0{len(first)}d}{url[match.end() :]}")
    ]
