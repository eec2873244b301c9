"""The page and its requests as an ASGI application, which uvicorn serves here and Ray Serve on a cluster.

Images of the collection are asked for by column and row id; no request names a path. Answers carry a content policy
that allows scripts and styles of this page alone. There is no CORS, and requests of other sites' pages are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import PurePath
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from grappa_dist.data.decoding import BadImage
from grappa_dist.output import printable_line
from grappa_dist.report.html import STYLE
from grappa_dist.serving.limits import BUSY, NO_IMAGE, Budget, Limits, Refused, open_upload
from grappa_dist.serving.searcher import Answer, Query, Searcher

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
HITS = 10  # of an answer, by default
THUMBNAILS = 2048  # that are kept in memory, some 10 kB each
ORIGINALS = 8  # files of images that are sent at a time
CHUNK = 2**16  # bytes of a file that are sent at once, so that a slow reader is noticed
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # row ids mean other images after the next start
}
Answering = Callable[[Query], Awaitable[Answer]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Engine:
    """How queries are answered: by batches, in this process or as a deployment batches them."""

    answer: Answering
    start: Callable[[], None] = lambda: None
    close: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)


def create_app(
    searcher: Searcher,
    engine: Engine,
    *,
    limits: Limits | None = None,
    hosts: Sequence[str] = LOOPBACK_NAMES,
    threads: int = 2,
) -> Starlette:
    """The application.

    Args:
        hosts: that requests may name, as a page elsewhere could give its own name this address; "*": any.
        threads: that decode uploads; as many others read images of the collection.
    """
    limits = limits or Limits()
    served = _Served(searcher, engine, limits, threads)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()
        served.close()

    routes = [*page_routes("page"), Route("/health", _health), *served.routes()]
    return guarded_app(routes, hosts=hosts, answer_s=limits.answer_s, lifespan=lifespan)


def guarded_app(
    routes: Sequence[Route], *, hosts: Sequence[str], answer_s: float, lifespan: Lifespan[Starlette] | None = None
) -> Starlette:
    """An application of some routes whose answers have the policy of above, and which other sites' pages cannot call.

    Args:
        hosts: as of `create_app`.
        answer_s: seconds that an answer may take.
    """
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(_Guard, answer_s=answer_s),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={Refused: _refused, HTTPException: _not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def as_json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: names of files need not be UTF-8."""
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status == BUSY else {}
    return as_json({"error": printable_line(str(error))}, error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return as_json({"error": error.detail}, error.status_code, error.headers)


@lru_cache
def _page_file(name: str) -> bytes:
    content = files(__package__).joinpath(name).read_bytes()
    return STYLE.encode() + content if name.endswith(".css") else content


async def _asset(name: str, kind: str, request: Request) -> Response:
    return Response(_page_file(name), media_type=kind)


async def _health(request: Request) -> Response:
    return as_json({"status": "ok"})


def page_routes(name: str) -> list[Route]:
    """The page `<name>.html` of this folder with its style and script."""
    return [
        Route("/", partial(_asset, f"{name}.html", "text/html")),
        Route(f"/{name}.css", partial(_asset, f"{name}.css", "text/css")),
        Route(f"/{name}.js", partial(_asset, f"{name}.js", "text/javascript")),
        Route("/icon.svg", partial(_asset, "icon.svg", "image/svg+xml")),
    ]


class _Served:
    """The requests about images."""

    def __init__(self, searcher: Searcher, engine: Engine, limits: Limits, threads: int) -> None:
        self._searcher, self._engine, self._limits = searcher, engine, limits
        self._budget = Budget(limits)
        self._decoders = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(max(1, threads), thread_name_prefix="read")
        self._originals = asyncio.Semaphore(ORIGINALS)
        self._thumbnail = lru_cache(THUMBNAILS)(searcher.thumbnail)

    def close(self) -> None:
        for pool in (self._decoders, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def routes(self) -> list[Route]:
        return [
            Route("/about", self.about),
            Route("/search", self.search, methods=["POST"]),
            Route("/thumbnails/{column}/{row}", self.thumbnail),
            Route("/images/{column}/{row}", self.image),
        ]

    async def about(self, request: Request) -> Response:
        """What is searched, and what is taken."""
        columns = [
            {
                "model": printable_line(column.model.variant),
                "of": printable_line(column.model.name),
                "images": len(column.collection) - len(column.collection.bad),
                "left_out": len(column.collection.bad),
                "exact": column.is_exact,
            }
            for column in self._searcher.columns
        ]
        limits = {"upload_bytes": self._limits.upload_bytes, "pixels": self._limits.pixels, "hits": self._limits.hits}
        return as_json({"columns": columns, "sets": list(self._searcher.sets), "limits": limits})

    async def search(self, request: Request) -> Response:
        """The body is the file of an image; `k` hits of every column."""
        hits = _count(request.query_params.get("k"), self._limits.hits)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Refused(NO_IMAGE, "a form was sent; expected the bytes of the image as the body of the request")
        with self._budget.search() as upload:
            try:
                data = await upload.read(request.stream())
            except ClientDisconnect:
                return Response(status_code=400)
            query, width, height = await self._in(self._decoders, self._query, data, hits)
            del data
            upload.release()
            answer = await self._engine.answer(query)
        return as_json(self._found(answer) | {"query": {"width": width, "height": height}})

    def _query(self, data: bytes, hits: int) -> tuple[Query, int, int]:
        picture = open_upload(data, self._limits)
        try:
            return self._searcher.query(picture, hits), picture.width, picture.height
        except BadImage as error:
            raise Refused(NO_IMAGE, f"the image cannot be read: {error}") from None

    def _found(self, answer: Answer) -> dict[str, Any]:
        columns = []
        for number, (column, hits) in enumerate(zip(self._searcher.columns, answer.hits, strict=True)):
            found = [
                {
                    "row": hit.row,
                    "name": printable_line(hit.name),
                    "cosine": round(hit.cosine, 6),
                    "thumbnail": f"thumbnails/{number}/{hit.row}",
                    "image": f"images/{number}/{hit.row}",
                }
                for hit in hits
            ]
            columns.append({"model": printable_line(column.model.variant), "hits": found})
        if answer.weights is None:
            return {"columns": columns, "weights": None}
        layers = [[round(float(weight), 6) for weight in layer] for layer in answer.weights]
        mean = [round(float(weight), 6) for weight in answer.weights.mean(0)]
        return {"columns": columns, "weights": {"sets": list(self._searcher.sets), "mean": mean, "layers": layers}}

    async def thumbnail(self, request: Request) -> Response:
        data = await self._of_collection(request, self._thumbnail)
        return Response(data, media_type="image/jpeg")

    async def image(self, request: Request) -> Response:
        """The file as it lies in the collection; of what browsers do not show, such as TIFF, a PNG or JPEG."""
        await self._originals.acquire()
        try:
            data, kind, name = await self._of_collection(request, self._searcher.original)
        except BaseException:
            self._originals.release()
            raise
        shown = quote(PurePath(name).name.encode("utf-8", "replace"), safe="")  # names need not be UTF-8
        headers = {
            "Content-Length": str(len(data)),
            "Content-Disposition": f"inline; filename*=UTF-8''{shown}",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        return _Held(self._originals.release, _chunks(data), media_type=kind, headers=headers)

    async def _of_collection(self, request: Request, work: Callable[[int, int], Result]) -> Result:
        column, row = (_number(request.path_params[name]) for name in ("column", "row"))
        try:
            return await self._in(self._readers, work, column, row)
        except KeyError:
            raise Refused(404, "there is no such image") from None
        except BadImage:  # whose message may quote what the file has become
            raise Refused(404, "the image is no longer there, or is none any more") from None

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


class _Held(StreamingResponse):
    """An answer that holds something until it is sent, or has failed."""

    def __init__(self, release: Callable[[], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise Refused(404, "there is no such image")
    return int(digits)


def _count(given: str | None, most: int) -> int:
    if given is None:
        return min(HITS, most)
    if not (given.isascii() and given.isdigit() and len(given) <= 9 and 1 <= int(given) <= most):
        raise Refused(400, f"k={given[:20]}: expected a number from 1 to {most}")
    return int(given)


class _Guard:
    """Headers of every answer; no requests of other sites' pages; an end of those that take too long."""

    def __init__(self, app: ASGIApp, answer_s: float) -> None:
        self._app, self._answer_s = app, answer_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if _is_foreign(scope["method"], Headers(scope=scope)):
            await as_json({"error": "a page of another site sent this request"}, 403)(scope, receive, guarded)
            return
        try:
            async with asyncio.timeout(self._answer_s):
                await self._app(scope, receive, guarded)
        except TimeoutError:
            if begun:  # the connection ends in the middle, which the client sees by the length
                raise
            await as_json({"error": "the answer took too long"}, 503)(scope, receive, guarded)


def _is_foreign(method: str, headers: Headers) -> bool:
    """Whether a browser says that the page of another site sent this request; following a link to here is none."""
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return method != "GET" or headers.get("sec-fetch-mode") != "navigate"
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
