"""What a request may cost: bytes that are read, pixels that are decoded, how many wait, and for how long.

An upload is counted while it is read, whatever its headers say; its size in pixels is read from the header of the
image before anything is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from grappa_dist.data.decoding import (
    FORMATS,
    MORE_FORMATS,
    BadImage,
    Picture,
    decode,
    describe_missing_decoder,
    open_picture,
    size_of,
    suffix_of,
)

MIB = 2**20
BUSY, TOO_LARGE, TOO_SLOW, NO_IMAGE, TOO_MANY_PIXELS = 503, 413, 408, 415, 422  # statuses of HTTP


class Refused(Exception):
    """A request that is not answered: the status of HTTP, and a line that says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What is taken from clients."""

    upload_bytes: int = 20 * MIB  # of one image
    pixels: int = 40_000_000  # of one image; decoding takes up to 20 bytes for each
    hits: int = 100  # of one answer
    held_bytes: int = 256 * MIB  # of all uploads that are in memory at a time
    waiting: int = 256  # searches that are under way or wait
    read_s: float = 30.0  # for an upload to arrive
    answer_s: float = 120.0  # for a whole request and its answer

    @property
    def most_held(self) -> int:
        """Bytes of all uploads in memory; one upload of the largest size is always taken."""
        return max(self.held_bytes, self.upload_bytes)


@dataclass
class Budget:
    """The bytes and the number of the uploads that are in memory now; used by one event loop."""

    limits: Limits
    held: int = 0
    searches: int = field(default=0)

    @contextmanager
    def search(self) -> Iterator[Upload]:
        """A place for one search.

        Raises:
            Refused: as many wait as may.
        """
        if self.searches >= self.limits.waiting:
            raise Refused(BUSY, f"{self.searches} searches are waiting; try again")
        self.searches += 1
        upload = Upload(self)
        try:
            yield upload
        finally:
            self.searches -= 1
            upload.release()


@dataclass
class Upload:
    """One image as it arrives."""

    budget: Budget
    held: int = 0

    async def read(self, parts: AsyncIterator[bytes]) -> bytes:
        """All bytes.

        Raises:
            Refused: they are too many, too slow or none, or too many others are in memory.
        """
        limits, chunks = self.budget.limits, list[bytes]()
        try:
            async with asyncio.timeout(limits.read_s):
                async for part in parts:
                    self._hold(len(part))
                    chunks.append(part)
        except TimeoutError:
            raise Refused(TOO_SLOW, f"the image did not arrive within {limits.read_s:g} s") from None
        data = b"".join(chunks)
        if not data:
            raise Refused(NO_IMAGE, "the request has no body; expected the bytes of an image")
        return data

    def _hold(self, size: int) -> None:
        limits = self.budget.limits
        if self.held + size > limits.upload_bytes:
            raise Refused(TOO_LARGE, f"the image has more than {limits.upload_bytes / MIB:.3g} MiB")
        if self.budget.held + size > limits.most_held:
            raise Refused(BUSY, "too many images arrive at the same time; try again")
        self.held += size
        self.budget.held += size

    def release(self) -> None:
        """The bytes are no longer needed."""
        self.budget.held -= self.held
        self.held = 0


def open_upload(data: bytes, limits: Limits) -> Picture:
    """The image in an upload; a plain JPEG file is not decoded yet.

    Raises:
        Refused: it is no image of a type that is decoded, or has too many pixels.
    """
    suffix = suffix_of(data)
    if missing := describe_missing_decoder(suffix):
        raise Refused(NO_IMAGE, missing)
    formats = (*FORMATS, *MORE_FORMATS.get(suffix, ()))
    try:
        width, height = size_of(data, formats)
        if width * height > limits.pixels:
            most = f"{limits.pixels / 1e6:.3g} million"
            raise Refused(TOO_MANY_PIXELS, f"the image has {width} x {height} pixels; {most} are decoded at most")
        return open_picture(data) if suffix not in MORE_FORMATS else Picture.of(decode(data, formats))
    except BadImage as error:
        raise Refused(NO_IMAGE, f"the image cannot be read: {error}") from None
