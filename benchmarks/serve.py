"""The page of `grappa-dist serve` under load: clients that search all the time, against a server that forms no batches.

The server is the command itself in a process of its own; the clients are connections of this process, each of which
sends its next image as soon as it has the answer to the last.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.data import PHOTO_PX, drawn_shards
from benchmarks.harness import Log, aligned, aligned_header, check_least, machine
from grappa_dist.data.decoding import BadImage

OURS, BASELINE = "batches", "one at a time"
PATIENCE_S = 600.0  # of a client


@dataclass(frozen=True)
class ServeSettings:
    """Options of `bench.py serve`."""

    model: str
    rows: int
    clients: int
    requests: int
    batch: int
    seed: int

    def check(self) -> None:
        check_least(self, rows=1, clients=1, requests=1, batch=1, seed=0)


@dataclass(frozen=True)
class Load:
    """What the clients of one server saw."""

    seconds: float
    latencies_s: tuple[float, ...]  # of the requests that were answered
    errors: dict[str, int]  # how many, by status or kind
    peak_bytes: int  # of the server's resident memory

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.seconds

    def percentile(self, share: float) -> float:
        """Of the latencies, in seconds; infinite where nothing was answered."""
        return float(np.percentile(self.latencies_s, share)) if self.latencies_s else float("inf")

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


@dataclass(frozen=True)
class ServeFindings:
    """Results of `bench.py serve`."""

    source: str
    loads: dict[str, Load]


def measure_serve(settings: ServeSettings, log: Log) -> ServeFindings:
    settings.check()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log("images")
        images, source = drawn_shards(folder, settings.rows, PHOTO_PX, settings.seed)
        found = images.images(range(min(settings.rows, 32)))
        queries = [data for data in found if not isinstance(data, BadImage)]
        loads = {}
        for side, batch in ((OURS, settings.batch), (BASELINE, 1)):
            log(f"{side}: embeds the images")
            with _server(settings.model, folder / "drawn", batch) as (url, pid):
                log(f"{side}: {settings.requests} requests of {settings.clients} clients")
                loads[side] = asyncio.run(_load(url, queries, settings, pid))
    return ServeFindings(source, loads)


@contextmanager
def _server(model: str, images: Path, batch: int) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server that answers."""
    words = ["serve", "--model", model, "--images", str(images), "--port", "0", "--batch-size", str(batch)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "grappa_dist", *words], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"serving .* at (http://\S+)", line):
                    yield found[1], process.pid
                    return
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["without a word"]
            raise ValueError(f"--model {model}: the server ended: {said[-1]}")
        finally:
            process.terminate()
            process.wait()


async def _load(url: str, queries: Sequence[bytes], settings: ServeSettings, pid: int) -> Load:
    """Sends the requests, after one that is not counted."""
    numbers, latencies, errors = iter(range(settings.requests)), list[float](), Counter[str]()

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            began = time.perf_counter()
            try:
                status = await _search(session, url, queries[number % len(queries)])
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                errors[type(error).__name__] += 1
                continue
            if status == 200:
                latencies.append(time.perf_counter() - began)
            else:
                errors[str(status)] += 1

    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=settings.clients)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await _search(session, url, queries[0])
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(settings.clients)))
        return Load(time.perf_counter() - began, tuple(latencies), dict(errors), _peak_bytes(pid))


async def _search(session: aiohttp.ClientSession, url: str, query: bytes) -> int:
    """The status of one search; its answer is read, and has hits.

    Raises:
        ValueError: the answer is none.
    """
    async with session.post(f"{url}search?k=10", data=query) as answer:
        text = await answer.text()
    if answer.status == 200 and not json.loads(text)["columns"][0]["hits"]:
        raise ValueError("an answer without hits")
    return answer.status


def _peak_bytes(pid: int) -> int:
    """0 where the system does not tell it."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def as_text(header: dict[str, str], settings: ServeSettings, found: ServeFindings) -> str:
    about = f"{settings.model}, batches of up to {settings.batch}, {settings.clients} clients"
    lines: list[Sequence[str]] = [["", "requests/s", "p50 s", "p99 s", "max s", "errors", "MiB at most"]]
    for side, load in found.loads.items():
        seconds = [f"{load.percentile(share):.2f}" for share in (50, 99, 100)]
        lines.append([side, f"{load.per_s:.1f}", *seconds, str(load.failed), f"{load.peak_bytes / 2**20:.0f}"])
    notes = [
        f"{side}: {kind} {count} times" for side, load in found.loads.items() for kind, count in load.errors.items()
    ]
    blocks = [aligned_header({**header, "images": found.source, "model": about}), "\n".join([aligned(lines), *notes])]
    return "\n\n".join(blocks)


def as_json(header: dict[str, str], settings: ServeSettings, found: ServeFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "settings": vars(settings),
        "images": found.source,
        "loads": {side: asdict(load) for side, load in found.loads.items()},
    }


SHORT = "the page that searches by an image, under load"
DESCRIPTION = """\
`grappa-dist serve` on drawn images, in a process of its own, and clients that search all the time: requests/s, the
median, the 99th percentile and the largest of the times to an answer, errors, and the server's peak memory. Beside it
the same server with batches of one."""
EXAMPLE = """example, a minute:
  python launch/bench.py serve --clients 50 --requests 1000"""


def arguments(add: Callable[..., Any]) -> None:
    demo = "grappa_dist.demo.backbone:create"
    add("--model", default=demo, metavar="M", help="a run, an exported model or a backbone; default: %(default)s")
    add("--rows", type=int, default=1000, metavar="N", help="drawn images that are searched; default: %(default)s")
    add("--clients", type=int, default=50, metavar="N", help="at the same time; default: %(default)s")
    add("--requests", type=int, default=1000, metavar="N", help="of all clients; default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="queries of a batch, at most; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = ServeSettings(**options)
    header = machine(1, "starlette", "uvicorn", "aiohttp")
    found = measure_serve(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
