"""Items that wait together are one batch; the failure of one is its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from grappa_dist.serving.batches import Batcher


def test_what_waits_while_a_batch_is_computed_is_the_next_batch() -> None:
    begun, go, threads = threading.Event(), threading.Event(), set[int]()

    def work(items: Sequence[int]) -> list[int | Exception]:
        threads.add(threading.get_ident())
        begun.set()
        assert go.wait(60)
        return [ValueError(f"{item}") if item == 3 else 10 * item for item in items]

    async def check() -> None:
        batcher = Batcher(work, most=4)
        batcher.start()
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(begun.wait, 60)
        others = [asyncio.create_task(batcher(item)) for item in range(1, 8)]
        gone = asyncio.create_task(batcher(9))
        await asyncio.sleep(0)
        gone.cancel()
        go.set()
        found = await asyncio.gather(first, *others, gone, return_exceptions=True)
        assert found[:3] + found[4:8] == [0, 10, 20, 40, 50, 60, 70]
        assert str(found[3]) == "3"
        assert isinstance(found[8], asyncio.CancelledError)
        assert batcher.sizes == [1, 4, 3]
        await batcher.close()

    asyncio.run(check())
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_failure_of_the_work_is_that_of_its_batch_alone() -> None:
    def work(items: Sequence[int]) -> list[int | Exception]:
        if 0 in items:
            raise RuntimeError("out of memory")
        return list(items)

    async def check() -> None:
        batcher = Batcher(work, most=4)
        batcher.start()
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher(0)
        assert await batcher(1) == 1
        await batcher.close()

    asyncio.run(check())


def test_what_waits_at_the_end_is_cancelled() -> None:
    async def check() -> None:
        batcher = Batcher(lambda items: list(items), most=4)
        waiting = asyncio.create_task(batcher(1))  # never started
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(check())
