"""Stores on loopback: a folder over HTTP, or an S3 server, behind a proxy that counts, delays and breaks requests."""

from __future__ import annotations

import hashlib
import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.processes import free_address

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
Backend = Callable[[str, str, dict[str, str], bytes], Answer]  # method, path, headers, body
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: tuple[int, int] | None  # first and last byte
    sent: int  # bytes of the body of the answer


@dataclass
class StoreProxy:
    """What a test sees of a store, and how it breaks it."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    latency_s: float = 0.0
    at_once: int = 0  # requests under way together, at most so far
    refuse: Callable[[str, str], int | None] = lambda method, path: None  # status instead of an answer
    cut: Callable[[str, str], int | None] = lambda method, path: None  # bytes after which the connection closes
    change: Callable[[Answer], Answer] = lambda answer: answer
    spoil: Callable[[BaseHTTPRequestHandler, Answer], Answer | None] = lambda handler, answer: (
        answer
    )  # None: it ended it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        self.requests.clear()
        fresh = StoreProxy()
        self.at_once = 0
        self.latency_s, self.refuse, self.cut, self.change = fresh.latency_s, fresh.refuse, fresh.cut, fresh.change
        self.spoil = fresh.spoil

    def ranges(self, ending: str = "") -> list[tuple[int, int]]:
        return [r.range for r in self.requests if r.range is not None and r.path.split("?")[0].endswith(ending)]

    def sent(self, ending: str) -> int:
        return sum(r.sent for r in self.requests if r.path.split("?")[0].endswith(ending))


@contextmanager
def proxy_to(backend: Backend) -> Iterator[StoreProxy]:
    """A proxy to a backend, on a free port of loopback."""
    proxy = StoreProxy()
    under_way: list[BaseHTTPRequestHandler] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # the whole answer in one write

        def handle_expect_100(self) -> bool:
            super().handle_expect_100()
            self.wfile.flush()
            return True

        def answer(self) -> None:
            given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            under_way.append(self)
            proxy.at_once = max(proxy.at_once, len(under_way))
            time.sleep(proxy.latency_s)
            under_way.remove(self)
            refused, cut = proxy.refuse(self.command, self.path), proxy.cut(self.command, self.path)
            if refused is None:
                status, headers, body = proxy.change(backend(self.command, self.path, dict(self.headers), given))
            else:
                status, headers, body = refused, {}, b""
            spoilt = proxy.spoil(self, (status, headers, body))
            if spoilt is None:
                self.close_connection = True
                return
            status, headers, body = spoilt
            sent = body if cut is None else body[:cut]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            span = None if asked is None else (int(asked[1]), int(asked[2]))
            proxy.requests.append(Request(self.command, self.path, span, 0 if self.command == "HEAD" else len(sent)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)
            self.close_connection = cut is not None

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing is printed about clients that are gone, or connections that a test has ended."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def folder_backend(folder: Path) -> Backend:
    """Files with ranges, ETags and If-Match, as a plain web server has them."""

    def answer(method: str, path: str, headers: dict[str, str], _: bytes) -> Answer:
        file = folder / path.split("?")[0].lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        data = file.read_bytes()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if headers.get("If-Match", tag) != tag:
            return 412, {}, b""
        return ranged(data, headers, tag, head=method == "HEAD")

    return answer


def ranged(data: bytes, headers: dict[str, str], tag: str, *, head: bool) -> Answer:
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
    if head or asked is None:
        return 200, {"ETag": tag, "Content-Length": str(len(data))}, b"" if head else data
    part = data[int(asked[1]) : int(asked[2]) + 1]
    span = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"
    return 206, {"ETag": tag, "Content-Range": span}, part


def upstream(port: int) -> Backend:
    """Passes everything on to a server on loopback."""
    local = threading.local()

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        kept = {name: value for name, value in headers.items() if name.lower() not in ("connection", "expect")}
        local.connection.request(method, path, body, kept)
        response = local.connection.getresponse()
        data = response.read()
        found = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        if method == "HEAD":
            found["Content-Length"] = response.getheader("Content-Length") or "0"
        return response.status, found, data

    return answer


@contextmanager
def s3_server() -> Iterator[int]:
    """A process that speaks the S3 protocol on a port of loopback, empty at first."""
    port = int(free_address().rpartition(":")[2])
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert process.poll() is None, "the S3 server ended"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/moto-api/")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise TimeoutError(f"no S3 server on port {port} after {timeout_s} s")
