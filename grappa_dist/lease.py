"""The lease of the driver of a run on an object store: one at a time, and a dead one's place is free when it expires.

A lease is a sequence of objects, `.lease/000000000001.json` and so on, each created only where there is none, which all
stores with conditional writes can do. Whoever has written the last one holds the run, renews by writing the next one,
and has lost it when somebody else has. It expires LEASE_S after its last object was written, by the store's clock.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from grappa_dist.bucket import Bucket, bucket_of
from grappa_dist.files import parse_json, read_bytes, write_bytes

LEASE_S = 60.0  # without a renewal, until another driver may take over
RENEW_S = 10.0
FOLDER = ".lease"
OWN = ".lease-holder"  # in the folder of a machine: the id of the driver that held the run last there
_NEEDED = (
    "a store that refuses to create an object where there is one (If-None-Match: *): Amazon S3, Google Cloud Storage, "
    "MinIO and Ceph of recent versions do"
)


@dataclass(frozen=True)
class Holder:
    """Who holds a run, or did last."""

    number: int
    id: str
    who: str  # "process 12 on host since ..."
    released: bool
    left_s: float  # until it expires, by the store's clock

    @property
    def holds(self) -> bool:
        return not self.released and self.left_s > 0


@dataclass
class Lease:
    """The lease of this process."""

    bucket: Bucket
    id: str = field(default_factory=lambda: uuid4().hex)
    number: int = 0
    lost: str = ""  # why, once it is
    resumed: bool = False  # whether the last driver had the folder of this one
    _stop: threading.Event = field(default_factory=threading.Event)

    def take(self) -> None:
        """Takes the lease.

        Raises:
            ValueError: another driver holds it, or the store cannot hold a lease.
        """
        last, own = holder(self.bucket), self.bucket.root / OWN
        self.resumed = last is not None and own.exists() and read_bytes(own).decode() == last.id
        if (
            last is not None and last.holds and not self.resumed
        ):  # of its own folder it holds the lock: that one is dead
            raise ValueError(
                f"another run is writing to {self.bucket.url} ({last.who}); wait for it, or choose another directory. "
                f"If it is dead, its lease ends in {last.left_s:.0f} s"
            )
        self.number = 0 if last is None else last.number
        if not self._write():
            raise ValueError(f"another run has just begun to write to {self.bucket.url}; wait for it")
        if self.bucket.create(_name(self.number), b"{}"):
            raise ValueError(f"out={self.bucket.url}: it lets an object be created twice; expected {_NEEDED}")
        write_bytes(own, self.id.encode())

    def _write(self, *, released: bool = False) -> bool:
        """Writes the next object; whether nobody else has."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        text = json.dumps({"id": self.id, "who": who, "released": released, "nonce": uuid4().hex}).encode()
        created = self.bucket.create(_name(self.number + 1), text)
        numbers = _numbers(self.bucket)
        if not created or numbers[-1] != self.number + 1:
            return False
        self.number += 1
        self.bucket.remove([_name(number) for number in numbers if number < self.number - 1])
        return True

    def renew(self) -> None:
        """Renews it until it is released; ends this process, as SIGTERM does, once it is lost."""
        renewed = time.monotonic()
        while not self._stop.wait(RENEW_S):
            began = time.monotonic()
            try:
                if not self._write():
                    last = holder(self.bucket)
                    self.lost = f"it was taken over by {last.who if last else 'nobody'}"
                renewed = began
            except (OSError, ValueError) as error:
                if time.monotonic() - renewed > LEASE_S:
                    self.lost = f"it could not be renewed: {error}"
            if self.lost:
                signal.raise_signal(signal.SIGTERM)
                return

    def end(self, thread: threading.Thread) -> None:
        """Ends the thread that renews it, and lets another driver take it; if that fails, it expires."""
        self._stop.set()
        thread.join()
        if not self.lost:
            with suppress(ValueError, OSError):
                self._write(released=True)


@contextmanager
def leased(root: Path) -> Iterator[Lease | None]:
    """The lease of a run, held while the block runs; None for a run that is on no object store.

    Raises:
        ValueError: as Lease.take.
        RuntimeError: it was lost meanwhile.
    """
    bucket = bucket_of(root)
    if bucket is None:
        yield None
        return
    lease = Lease(bucket)
    lease.take()
    thread = threading.Thread(target=lease.renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except BaseException as error:
        if lease.lost:
            raise RuntimeError(f"the lease of {bucket.url} was lost: {lease.lost}") from error
        raise
    finally:
        lease.end(thread)
    if lease.lost:
        raise RuntimeError(f"the lease of {bucket.url} was lost: {lease.lost}")


def holder(bucket: Bucket, *, write: bool = True) -> Holder | None:
    """Who holds a run, or did last; None where nobody has.

    Args:
        write: whether an object may be written to learn the store's time; else this machine's clock is believed.
    """
    numbers = _numbers(bucket)
    if not numbers:
        return None
    name = _name(numbers[-1])
    text = bucket.read(name)
    if text is None:  # renewed meanwhile, and removed
        return holder(bucket, write=write)
    found = parse_json(text, f"{bucket.url}/{name}")
    now = datetime.now(UTC)
    if write:
        probe = f"{FOLDER}/clock-{uuid4().hex}"
        bucket.write(probe, b"")
        now = bucket.modified(probe)
        bucket.remove([probe])
    age_s = (now - bucket.modified(name)).total_seconds()
    return Holder(numbers[-1], str(found["id"]), str(found["who"]), bool(found["released"]), LEASE_S - age_s)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:012d}.json"


def _numbers(bucket: Bucket) -> list[int]:
    names = (name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in bucket.names(FOLDER))
    return sorted(int(name) for name in names if name.isdecimal())
