"""Object stores through fsspec: a connection per process, what may pass is asked for again, errors in one line.

The library reads credentials, endpoints and proxies (environment, configuration files); none is logged.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from grappa_dist.extras import require
from grappa_dist.storage import Result

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}  # of each protocol, for fsspec
CONNECTIONS = 64  # per process and store; botocore's own limit of 10 would hold back what is in flight
ATTEMPTS = 6  # at one request
PAUSE_S = 0.25  # before the second attempt, at most; then twice as long each time
_CONNECT_S, _SILENT_S, _REQUEST_S = 10.0, 30.0, 600.0  # of http(s): to connect, between two bytes, in all
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_KINDS = frozenset(  # by name: only libraries in use are loaded
    {
        *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
        *("HTTPClientError", "ResponseParserError", "IncompleteReadError", "FlexibleChecksumError"),  # botocore
    }
)
_PASSING_CODES = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout"})  # of S3
_QUERY = re.compile(r"\?[^\s'\"]*")


class StoreUnavailable(OSError):
    """A store failed ATTEMPTS times in a way that may pass."""


class BrokenAnswer(Exception):
    """An answer that is cut off, or holds other bytes than those asked for."""


def is_remote(path: str) -> bool:
    return "://" in path


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def check_url(url: str, what: str = "shards") -> str:
    """The URL, without a slash at its end; `what` it is begins an error.

    Raises:
        ValueError: another protocol than we read, or a secret in the URL, which is not repeated.
    """
    parts = urlsplit(url)
    if parts.scheme not in PACKAGES:
        known = ", ".join(f"{protocol}://" for protocol in PACKAGES)
        raise ValueError(f"{what}: {parts.scheme}:// is not read; expected one of {known} or a mounted folder")
    if "@" in parts.netloc or (is_http(url) and (parts.query or parts.fragment)):
        raise ValueError(
            f"{what}: {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} was given with a user, password "
            "or query; expected a plain URL (credentials belong in the environment, a signed URL would expire)"
        )
    return url.rstrip("/")


def patiently(ask: Callable[[], Result]) -> Result:
    """What `ask()` returns; what may pass is tried ATTEMPTS times, and its last error raised."""
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except library_errors() as error:
            if not is_passing(error):
                raise
            time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))  # not all readers at one moment
    return ask()


def describe(error: BaseException) -> str:
    """A library's error in one line, without the queries of URLs, which may hold a signature."""
    text = _QUERY.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def store_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, one per process, and the path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    protocol = urlsplit(url).scheme
    require(PACKAGES[protocol], what=url)
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        configured = conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **configured}
        options["local_expiry_check"] = True  # the version in each answer is compared, too
    elif is_http(url):
        import aiohttp

        limits = aiohttp.ClientTimeout(_REQUEST_S, sock_connect=_CONNECT_S, sock_read=_SILENT_S)
        options["client_kwargs"] = {"timeout": limits, **conf.get(protocol, {}).get("client_kwargs", {})}
    found: tuple[Any, str] = url_to_fs(url, **options)
    if protocol == "s3":
        found[0].retries = 1  # of its own: `patiently` has them, beside those of botocore
    return found


def whole(fs: Any, name: str) -> bytes:
    """All bytes of a small object.

    Raises:
        BrokenAnswer: fewer or more came than the store says it has; a caller that asks `patiently` asks again.
    """
    data: bytes = fs.cat_file(name)
    size = fs.info(name).get("size")  # None: a web server that does not say
    if size is not None and len(data) != int(size):
        raise BrokenAnswer(f"{len(data)} of {size} bytes came")
    return data


def library_errors() -> tuple[type[BaseException], ...]:
    """What reading may raise: the libraries' errors have no common base class, and only libraries in use are loaded."""
    kinds = [("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")]
    kinds += [("botocore.exceptions", "ClientError"), ("botocore.parsers", "ResponseParserError")]
    kinds += [("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError")]
    loaded = [getattr(sys.modules[module], name) for module, name in kinds if module in sys.modules]
    return (OSError, ValueError, KeyError, BrokenAnswer, *loaded)  # KeyError: a page of a listing without its next page


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the store is busy or out of reach, or its answer was cut off."""
    for each in filter(None, (error, error.__cause__)):
        kinds = {kind.__name__ for kind in type(each).__mro__}
        if isinstance(each, BrokenAnswer | TimeoutError | ConnectionError | KeyError) or kinds & _PASSING_KINDS:
            return True
        if status_of(each) in _PASSING_STATUS or _code(each) in _PASSING_CODES:
            return True
    return False


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an error of aiohttp, botocore or gcsfs; None where there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _code(error: BaseException | None) -> str | None:
    """The code in an error of botocore."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def is_missing(error: BaseException) -> bool:
    gone = _code(error) in ("NoSuchBucket", "NoSuchKey")
    return gone or isinstance(error, FileNotFoundError) or status_of(error) == 404
