"""The page that asks "do these two images show the same?", one pair at a time, as an ASGI application.

What a browser gets of an image is a word drawn by chance and its pixels as a JPEG file: neither names, nor which model
found it, nor anything that a file says beside its pixels. Figures are answered on request alone, at the end.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grappa_dist.data.decoding import BadImage
from grappa_dist.output import printable_line
from grappa_dist.retrieval.answer_file import VALUES, AnswerFile
from grappa_dist.retrieval.labelling import Labelling, describe_result
from grappa_dist.serving.app import LOOPBACK_NAMES, as_json, guarded_app, page_routes
from grappa_dist.serving.limits import Refused
from grappa_dist.serving.searcher import shrunk

SIDE_PX = 640  # of the longer side of an image
PICTURES = 512  # that are kept in memory, some 60 kB each
ANSWER_S = 60.0  # for a request and its answer
_BODY = 200  # bytes of an answer, at most


def create_app(
    labelling: Labelling,
    answers: AnswerFile,
    *,
    finish: Callable[[], None] = lambda: None,
    hosts: Sequence[str] = LOOPBACK_NAMES,
) -> Starlette:
    """The application.

    Args:
        answers: gets every answer before the page goes on.
        finish: called after the answer to a request of the page to end.
        hosts: as of `app.create_app`.
    """
    served = _Questions(labelling, answers, finish)
    return guarded_app([*page_routes("questions"), *served.routes()], hosts=hosts, answer_s=ANSWER_S)


class _Questions:
    """The requests about pairs."""

    def __init__(self, labelling: Labelling, answers: AnswerFile, finish: Callable[[], None]) -> None:
        self._labelling, self._answers, self._finish = labelling, answers, finish
        self._words = {row: secrets.token_urlsafe(9) for pair in labelling.pairs for row in pair}
        self._rows = {word: row for row, word in self._words.items()}
        self._picture = lru_cache(PICTURES)(lambda row: shrunk(labelling.read(row), SIDE_PX))
        self._writing = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/questions", self.questions),
            Route("/questions/{number:int}", self.answer, methods=["POST"]),
            Route("/images/{word}", self.image),
            Route("/result", self.result),
            Route("/finish", self.finish, methods=["POST"]),
        ]

    async def questions(self, request: Request) -> Response:
        """All pairs, as words for their images, with the answers that are there."""
        pairs: list[dict[str, Any]] = [
            {"images": [self._words[row] for row in pair], "answer": self._labelling.answer(self._answers, pair)}
            for pair in self._labelling.pairs
        ]
        return as_json({"questions": pairs})

    async def answer(self, request: Request) -> Response:
        """The body is {"answer": ...}; the reply comes once it is in the file."""
        number = request.path_params["number"]
        if number >= len(self._labelling.pairs):
            raise Refused(404, f"there is no question {number}")
        answer = _answer_in(await request.body() if _is_short(request) else b"")
        async with self._writing:  # one after the other, as each writes the whole file
            try:
                await asyncio.to_thread(self._labelling.add, self._answers, self._labelling.pairs[number], answer)
            except OSError as error:
                raise Refused(500, f"the answer is not kept: {error}") from None
        return as_json({"answer": answer})

    async def image(self, request: Request) -> Response:
        row = self._rows.get(request.path_params["word"])
        if row is None:
            raise Refused(404, "there is no such image")
        try:
            data = await asyncio.to_thread(self._picture, row)
        except BadImage as error:
            raise Refused(404, f"the image cannot be read: {error}") from None
        # the words are new at every start, so what a browser keeps is never another image
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400, immutable"})

    async def result(self, request: Request) -> Response:
        return as_json({"text": await asyncio.to_thread(describe_result, self._labelling, self._answers)})

    async def finish(self, request: Request) -> Response:
        reply = as_json({"finished": True})
        reply.background = BackgroundTask(self._finish)
        return reply


def _is_short(request: Request) -> bool:
    size = request.headers.get("content-length", "")
    return size.isascii() and size.isdigit() and len(size) < 9 and int(size) <= _BODY


def _answer_in(body: bytes) -> str:
    try:
        match json.loads(body):
            case {"answer": str(answer)} if answer in VALUES:
                return answer
    except ValueError:
        pass
    expected = ", ".join(f'"{answer}"' for answer in VALUES)
    raise Refused(400, f'{printable_line(body.decode(errors="replace"))}: expected {{"answer": one of {expected}}}')
