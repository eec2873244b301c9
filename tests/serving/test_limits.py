"""Uploads are counted while they are read, and no more wait than may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from grappa_dist.serving import limits
from grappa_dist.serving.limits import Budget, Limits, Refused, open_upload
from tests.serving.served import encoded


async def parts(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield bytes(size)


def test_bytes_are_held_until_the_search_ends() -> None:
    async def check() -> None:
        budget = Budget(Limits(upload_bytes=10, held_bytes=12))
        with budget.search() as first:
            assert await first.read(parts(4, 5)) == bytes(9)
            with budget.search() as second:
                with pytest.raises(Refused, match="too many images arrive") as caught:
                    await second.read(parts(2, 2))
                assert caught.value.status == 503
            assert (budget.held, budget.searches) == (9, 1)
            with budget.search() as second:
                with pytest.raises(Refused, match="more than") as caught:
                    await second.read(parts(11))
                assert caught.value.status == 413
        assert (budget.held, budget.searches) == (0, 0)

    asyncio.run(check())


def test_an_upload_of_the_largest_size_is_taken_whatever_all_together_may_hold() -> None:
    async def check() -> None:
        budget = Budget(Limits(upload_bytes=20, held_bytes=12))
        with budget.search() as upload:
            assert await upload.read(parts(15)) == bytes(15)

    asyncio.run(check())


def test_no_more_searches_wait_than_may() -> None:
    budget = Budget(Limits(waiting=2))
    with budget.search(), budget.search():
        with pytest.raises(Refused, match="2 searches are waiting") as caught, budget.search():
            pass
        assert caught.value.status == 503
    with budget.search():
        assert budget.searches == 1


def test_the_pixels_of_a_header_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    files = [encoded(Image.new("RGB", (40, 30)), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    pictures = [open_upload(file, Limits(pixels=1200)) for file in files]
    assert {(picture.width, picture.height) for picture in pictures} == {(40, 30)}
    for name in ("decode", "open_picture"):
        monkeypatch.setattr(limits, name, decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    for file in files:
        with pytest.raises(Refused, match="40 x 30 pixels") as caught:
            open_upload(file, Limits(pixels=1199))
        assert caught.value.status == 422
