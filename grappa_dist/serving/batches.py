"""Requests that wait together are computed together: one batch after the other, in a thread of its own.

No request waits for others to come: while a batch is computed, the next one gathers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_Waiting = tuple[Item, "asyncio.Future[Result]"]


class Batcher(Generic[Item, Result]):
    """Calls `work` on lists of items; `await batcher(item)` gives the result of one.

    Args:
        work: the results of some items, in their order; one that is an exception is raised for that item alone.
        most: items of a batch, at most.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]], most: int) -> None:
        self._work, self._most = work, most
        self._queue: asyncio.Queue[_Waiting[Item, Result]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._loop: asyncio.Task[None] | None = None
        self.sizes: list[int] = []  # of the last batches

    async def __call__(self, item: Item) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, future))
        return await future

    def start(self) -> None:
        """Begins to compute, in the event loop that runs."""
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends the thread after the batch that is computed; what still waits is cancelled."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [waiting for waiting in batch if not waiting[1].done()]  # the client has gone
            try:
                await self._answer(batch)
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise

    async def _answer(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        if not batch:
            return
        self.sizes = [*self.sizes[-99:], len(batch)]
        items = [item for item, _ in batch]
        results: Sequence[Result | Exception]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, items)
        except Exception as error:  # of the work itself: each request fails with it, and the next batch is tried
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
