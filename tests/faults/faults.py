"""The faults: how each is injected into a running program, what ends it, and how the program may end by it."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.e2e import runs
from tests.faults import faulty_http
from tests.faults.clock import Clock
from tests.faults.injection import StorageErrors
from tests.faults.small_run import Driver, SmallRun
from tests.stores import StoreProxy

TARGET_S = 60.0  # for a process that is to be hit to be there
DAY_S = 86_400.0
LIMIT_MARGIN_BYTES = 2**20


class Missed(Exception):
    """The run ended, or has no such process, before the fault could happen."""


@dataclass
class Scene:
    """What a fault may act on."""

    run: SmallRun
    driver: Driver
    draws: random.Random
    storage: StorageErrors | None = None
    clock: Clock | None = None
    server: StoreProxy | None = None
    filled: list[Path] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def target(self, role: str, index: int = 0) -> int:
        """The pid of a process, once it is there."""
        end = time.monotonic() + TARGET_S
        while self.driver.process.poll() is None and time.monotonic() < end:
            found = [self.driver.process.pid] if role == "driver" else self._workers() if role == "worker" else []
            found = found or self.run.pids(role)
            if len(found) > index:
                return found[index]
            time.sleep(0.05)
        raise Missed(f"no {role}")

    def _workers(self) -> list[int]:
        """The process of rank 0 first, where a job tells which one that is."""
        workers, begun = self.run.pids("worker"), list[tuple[float, int]]()
        for job in ("adaptors/k=4", "adaptors/k=6", "fusion/neighbours"):
            begun += [
                (float(str(event["t"])), int(str(event["pid"])))
                for event in runs.metrics(self.run.root, job)
                if event["name"] == "begins"
            ]
        newest = [pid for _, pid in sorted(begun, reverse=True) if pid in workers][:1]
        return newest + [pid for pid in workers if pid not in newest]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Args:
        group: rows of the table are sorted by it.
        undo: ends a fault that lasts.
        lasts_s: how long it lasts, at least and at most; None: until the program ends.
        awaited: whether nothing else happens until it is noticed: the program goes on for a while, or ends.
        statuses: what the program may end with while the fault lasts, or because of it.
        says: a pattern that the one line of an error must match.
        needs: what has to be prepared before the run starts.
    """

    name: str
    group: str
    inject: Callable[[Scene], None]
    undo: Callable[[Scene], None] = lambda scene: None
    lasts_s: tuple[float, float] | None = (0.0, 0.0)
    awaited: bool = False
    statuses: tuple[int, ...] = (0,)
    says: str = ""
    needs: str = ""


def _kill(role: str, index: int = 0, number: int = signal.SIGKILL) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        pid = scene.target(role, index)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            raise Missed(f"the {role} has just ended") from None

    return inject


def _stop(scene: Scene) -> None:
    pid = scene.target("worker", scene.draws.randrange(2))
    os.kill(pid, signal.SIGSTOP)
    scene.stopped.append(pid)


def _continue(scene: Scene) -> None:
    for pid in scene.stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    scene.stopped.clear()


def _limit_memory(role: str) -> Callable[[Scene], None]:
    """The process gets no more memory than it has, and a little: a real MemoryError, or std::bad_alloc."""

    def inject(scene: Scene) -> None:
        pid = scene.target(role, scene.draws.randrange(1 + (role == "worker")))
        with _still_there(role):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_MARGIN_BYTES
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    return inject


def _limit_files(role: str) -> Callable[[Scene], None]:
    """The process may open no more files than it has open."""

    def inject(scene: Scene) -> None:
        pid = scene.target(role, scene.draws.randrange(1 + (role == "worker")))
        with _still_there(role):
            used = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))

    return inject


@contextmanager
def _still_there(role: str) -> Iterator[None]:
    """A process that is to be limited may have just ended: the fault is missed."""
    try:
        yield
    except OSError:
        raise Missed(f"the {role} has just ended") from None


def _unlimit(scene: Scene) -> None:
    for pid in scene.run.processes():
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
            with suppress(OSError, ValueError):
                hard = resource.prlimit(pid, limit)[1]
                resource.prlimit(pid, limit, (hard, hard))


def _fill(folder: Callable[[Scene], Path]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        filler = folder(scene) / ".filler"
        scene.filled.append(filler)
        with open(filler, "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    return inject


def _make_space(scene: Scene) -> None:
    for filler in scene.filled:
        filler.unlink(missing_ok=True)
    scene.filled.clear()


def _on_storage(act: Callable[[StorageErrors], None]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        assert scene.storage is not None
        act(scene.storage)

    return inject


def _jump(offset_s: float) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        assert scene.clock is not None
        scene.clock.jump_to(offset_s)

    return inject


def _serve(kind: faulty_http.Fault | None) -> Callable[[Scene], None]:
    """From now on the store answers all requests in this wrong way."""

    def inject(scene: Scene) -> None:
        assert scene.server is not None
        scene.server.spoil = faulty_http.always(kind)

    return inject


WORKER = "worker"
KILLS = (
    Fault("kill -9 of the driver", "kills", _kill("driver"), awaited=True, statuses=(-9,)),
    Fault("kill -9 of the worker of rank 0", "kills", _kill(WORKER)),
    Fault("kill -9 of the other worker", "kills", _kill(WORKER, 1)),
    Fault("kill -9 of the raylet", "kills", _kill("raylet"), awaited=True, statuses=(0, 1)),
    Fault("kill -9 of the GCS", "kills", _kill("GCS"), awaited=True, statuses=(0, 1)),
    Fault("kill -9 of the dashboard agent", "kills", _kill("dashboard agent"), awaited=True, statuses=(0, 1)),
    Fault(
        "kill -9 of the runtime environment agent",
        "kills",
        _kill("runtime environment agent"),
        awaited=True,
        statuses=(0, 1),
    ),
)
SIGNALS = (
    Fault(
        "SIGTERM", "signals", _kill("driver", 0, signal.SIGTERM), awaited=True, statuses=(143, -15), says="terminated"
    ),
    Fault("SIGINT", "signals", _kill("driver", 0, signal.SIGINT), awaited=True, statuses=(130, -2), says="interrupted"),
    Fault("SIGHUP", "signals", _kill("driver", 0, signal.SIGHUP), awaited=True, statuses=(143, 129, -1), says=""),
    Fault("SIGSTOP of a worker, seconds", "signals", _stop, _continue, (2.0, 10.0)),
    Fault("SIGSTOP of a worker, minutes", "signals", _stop, _continue, (120.0, 120.0)),
)
MEMORY = "[Mm]emory|Errno 12|bad_alloc|thread"
LIMITS = (
    Fault("out of memory in a worker", "limits", _limit_memory(WORKER), _unlimit, (6.0, 6.0), statuses=(0, 1)),
    Fault(
        "out of memory in the driver",
        "limits",
        _limit_memory("driver"),
        _unlimit,
        (6.0, 6.0),
        False,
        (0, 1, -6),
        MEMORY,
    ),
    Fault("no more open files in a worker", "limits", _limit_files(WORKER), _unlimit, (6.0, 6.0), statuses=(0, 1)),
    Fault(
        "no more open files in the driver",
        "limits",
        _limit_files("driver"),
        _unlimit,
        (6.0, 6.0),
        statuses=(0, 1),
        says="open files|Errno 24",
    ),
)
FULL = "No space left|Errno 28|disk|space|full"
_FULL_DISK = Fault("", "storage", lambda scene: None, _make_space, (8.0, 8.0), statuses=(0, 1), needs="mounts")
DISKS = (
    replace(
        _FULL_DISK,
        name="disk full at the run directory",
        inject=_fill(lambda scene: scene.run.root),
        lasts_s=None,
        says=FULL,
    ),
    Fault(
        "disk full at the run directory, injected",
        "storage",
        _on_storage(lambda storage: storage.full_after(0)),
        _on_storage(lambda storage: storage.full_after(None)),
        None,
        statuses=(0, 1),
        says=FULL,
        needs="storage",
    ),
    replace(_FULL_DISK, name="disk full at TMPDIR", inject=_fill(lambda scene: scene.run.temporary)),
    replace(_FULL_DISK, name="disk full at /dev/shm", inject=_fill(lambda scene: Path("/dev/shm"))),
    Fault(
        "run directory turns read-only",
        "storage",
        _on_storage(lambda storage: storage.read_only()),
        _on_storage(lambda storage: storage.read_only(False)),
        None,
        statuses=(0, 1),
        says="Read-only|read-only|Errno 30|cannot be written",
        needs="storage",
    ),
    Fault(
        "0.2 % of reads, writes and fsyncs answer EIO",
        "storage",
        _on_storage(lambda storage: storage.err(0.002, errno.EIO)),
        _on_storage(lambda storage: storage.err(0.0)),
        None,
        statuses=(0, 1),
        says="Input/output error|Errno 5|EIO",
        needs="storage",
    ),
)
CLOCKS = (
    Fault("clock jumps a day ahead", "clock", _jump(DAY_S), needs="clock"),
    Fault("clock jumps a day back", "clock", _jump(-DAY_S), needs="clock"),
)
_SERVED = Fault("", "object store", lambda scene: None, _serve(None), (1.0, 8.0), statuses=(0, 1), needs="server")
STORES = tuple(
    replace(
        _SERVED,
        name=f"store: {name}",
        inject=_serve(kind),
        lasts_s=(5.0, 40.0) if "no answer" in name else (1.0, 8.0),
        statuses=(0, 1, 2) if "ETag" in name else (0, 1),  # 2: another object than was listed
    )
    for name, kind in (
        ("status 500", faulty_http.Fault.ERROR),
        ("status 503", faulty_http.Fault.SLOW_DOWN),
        ("no answer", faulty_http.Fault.HANG),
        ("connections are reset", faulty_http.Fault.RESET),
        ("bodies end early", faulty_http.Fault.CUT),
        ("short bodies, announced as whole", faulty_http.Fault.SHORT),
        ("bytes of another range", faulty_http.Fault.OTHER_RANGE),
        ("another ETag", faulty_http.Fault.OTHER_TAG),
    )
)
FAULTS = {fault.name: fault for fault in (*KILLS, *SIGNALS, *LIMITS, *DISKS, *CLOCKS, *STORES)}
