"""Answers of an object store that are wrong: each kind by itself, or a mix of them now and then, drawn by a seed.

`proxy.spoil = always(Fault.RESET)`, or `now_and_then(seed, share)`, on a `StoreProxy` of tests/stores.py: a web server
or an S3 server behind it, in this process, for programs in any other.
"""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from enum import Enum
from http.server import BaseHTTPRequestHandler

from tests.stores import Answer

Spoil = Callable[[BaseHTTPRequestHandler, Answer], Answer | None]
HANG_S = 300.0  # longer than any client waits
IN_A_ROW = 2  # faults of one path that follow each other at most, where they come now and then


class Fault(Enum):
    """What is wrong with an answer."""

    ERROR = "status 500"
    SLOW_DOWN = "status 503 with a request to ask less often"
    HANG = "no answer, on a connection that stays open"
    RESET = "the connection is reset in the middle of the body"
    CUT = "the connection ends in the middle of the body, whose length was announced"
    SHORT = "half of the bytes of an object, announced as all of them"
    OTHER_RANGE = "other bytes than those asked for, as many"
    OTHER_TAG = "the right bytes, of another version by the ETag"
    NO_RANGE = "status 416"
    WHOLE = "status 200 and the whole object, where a range was asked for"
    REDIRECT = "a redirection to the same place"
    HALF_LISTING = "the first half of a listing's text, announced as all of it"
    NO_TOKEN = "a page of a listing that says that there are more, and not where"


PASSING = frozenset({Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.CUT, Fault.SHORT, Fault.OTHER_RANGE})
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def always(fault: Fault | None) -> Spoil:
    """Spoils every answer in one way."""
    return lambda handler, answer: answer if fault is None else spoilt(fault, handler, answer)


def in_turn(*faults: Fault | None) -> Spoil:
    """Spoils the first answers, one by one, and none after them."""
    left, lock = list(faults), threading.Lock()

    def spoil(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
        with lock:
            fault = left.pop(0) if left else None
        return answer if fault is None else spoilt(fault, handler, answer)

    return spoil


def now_and_then(seed: int, share: float, kinds: Collection[Fault] = PASSING) -> Spoil:
    """Spoils a share of the answers, by kinds drawn from a seed; of one path never more than IN_A_ROW in a row."""
    draw, order, lock = random.Random(seed), sorted(kinds, key=lambda kind: kind.name), threading.Lock()
    row: dict[str, int] = {}

    def spoil(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
        with lock:
            hit = draw.random() < share and row.get(handler.path, 0) < IN_A_ROW
            row[handler.path] = row.get(handler.path, 0) + 1 if hit else 0
            fault = draw.choice(order)
        return spoilt(fault, handler, answer) if hit else answer

    return spoil


def spoilt(fault: Fault, handler: BaseHTTPRequestHandler, answer: Answer) -> Answer | None:
    """The answer with a fault in it; None where the fault is that the connection ends."""
    status, headers, body = answer
    half = body[: len(body) // 2]
    asks_for_range = "Range" in handler.headers and status == 206
    match fault:
        case Fault.ERROR:
            return 500, {}, b""
        case Fault.SLOW_DOWN:
            return 503, {"Content-Type": "application/xml"}, _SLOW_DOWN
        case Fault.HANG:
            time.sleep(HANG_S)
            return None
        case Fault.RESET | Fault.CUT:
            _end_early(handler, (status, headers, body), reset=fault is Fault.RESET)
            return None
        case Fault.SHORT if handler.command == "GET" and status in (200, 206) and b"<ListBucketResult" not in body:
            return status, headers, half
        case Fault.OTHER_RANGE if asks_for_range:
            span = re.sub(r"\d+(?=[-/])", lambda place: str(int(place[0]) + 1), headers["Content-Range"])
            return status, {**headers, "Content-Range": span}, bytes(len(body))
        case Fault.OTHER_TAG if status < 300:
            return status, {**headers, "ETag": '"another"'}, body
        case Fault.NO_RANGE if asks_for_range:
            return 416, {}, b""
        case Fault.WHOLE if asks_for_range:
            return 200, {}, bytes(10**6)
        case Fault.REDIRECT:
            return 302, {"Location": handler.path}, b""
        case Fault.HALF_LISTING if b"<ListBucketResult" in body:
            return status, headers, half
        case Fault.NO_TOKEN if b"<ListBucketResult" in body:
            return status, headers, body.replace(b"<IsTruncated>false<", b"<IsTruncated>true<")
    return answer


def _end_early(handler: BaseHTTPRequestHandler, answer: Answer, *, reset: bool) -> None:
    """Sends the headers and half of the body, and ends the connection: with a reset, or as if that was all."""
    status, headers, body = answer
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": headers.get("Content-Length", str(len(body)))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    if reset:  # what is not read yet by then is lost
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())  # at once, though files of the handler refer to it
