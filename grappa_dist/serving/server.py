"""The application as a server of this process: where it listens, how it stops, and what slow clients may do.

The library is uvicorn; ours are the port that is taken before anything is embedded, and an end of connections that
send no request.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from grappa_dist.serving.app import LOOPBACK_NAMES, Engine
from grappa_dist.serving.batches import Batcher
from grappa_dist.serving.searcher import Searcher

HEAD_S = 15.0  # for the first line and the headers of a request to arrive
IDLE_S = 5  # that a connection stays open between requests
STOP_S = 10  # for requests under way, after Ctrl-C or SIGTERM
CONNECTIONS = 512
BACKLOG = 256


def take_port(host: str, port: int, *, public: bool) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Args:
        port: 0: any that is free.
        public: whether an address that other machines reach is meant.

    Raises:
        ValueError: there is no such address here, the port is in use, or other machines reach it and that is not meant.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise ValueError(f"--host {host}: no address of this machine is known by that name") from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and not public:
        raise ValueError(
            f"--host {host}: other machines could see the images, and no password is asked for; add --public if that "
            "is meant, or use 127.0.0.1"
        )
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise _taken(host, port, error) from None
    return found


def _taken(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(
        f"--port {port}: cannot listen on {host} ({error.strerror}); name another port, or 0 for a free one"
    )


def url_of(bound: socket.socket) -> str:
    """What a browser on this machine opens."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def hosts_of(host: str, more: tuple[str, ...]) -> tuple[str, ...]:
    """The names that requests may call this server by."""
    named = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys([*LOOPBACK_NAMES, named, socket.gethostname(), *more]))


def engine_of(searcher: Searcher, batch_size: int) -> Engine:
    """Answers by batches in a thread of this process."""
    batcher = Batcher(searcher.answer, batch_size)
    return Engine(batcher, batcher.start, batcher.close)


class _Impatient(H11Protocol):
    """Closes connections on which no whole request arrives; uvicorn waits for its first bytes for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        before = self.cycle
        self.loop.call_later(HEAD_S, lambda: self._close_unless(before))

    def _close_unless(self, before: object) -> None:
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Says when requests are answered."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def config_of(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=_Impatient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=2**14,  # bytes of headers
    )


def serve(app: Starlette, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Answers requests until SIGTERM or Ctrl-C; requests under way are finished, a second signal ends at once.

    Args:
        ready: called once requests are answered.

    Raises:
        ValueError: another program listens there meanwhile.
    """
    with bound, _ending_quietly():
        try:
            bound.listen(BACKLOG)
        except OSError as error:
            host, port = bound.getsockname()[:2]
            raise _taken(host, port, error) from None
        _Server(config_of(app), ready).run(sockets=[bound])


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C do nothing more once uvicorn has stopped; it raises them again at its end."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
