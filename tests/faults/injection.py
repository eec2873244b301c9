"""Storage that fails, in the processes of a test: builds storage_errors.c and writes the file that controls it.

    with StorageErrors(tmp_path / "control", [run_folder]) as storage:
        storage.err(0.002)
        subprocess.run(command, env=os.environ | storage.environment)
        assert storage.counts.failed

Everything but the environment may be set while the processes run. Calls on files mapped into memory are not seen.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SOURCE = Path(__file__).with_name("storage_errors.c")
READ, WRITE, SYNC, OPEN, RENAME = 1, 2, 4, 8, 16
_FOLDERS_BYTES = 4096


class _Control(ctypes.LittleEndianStructure):
    """`struct control` of storage_errors.c."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("rate", ctypes.c_double),
        ("capacity", ctypes.c_int64),
        ("error", ctypes.c_uint32),
        ("kinds", ctypes.c_uint32),
        ("read_only", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("calls", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("full", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("folders", ctypes.c_char * _FOLDERS_BYTES),
    )


@dataclass(frozen=True)
class Counts:
    """Calls that failed in all processes so far."""

    failed: int  # at random
    full: int  # with ENOSPC


def why_unavailable() -> str | None:
    """Why storage cannot be made to fail on this machine, or None; for `pytest.mark.skipif`."""
    if os.uname().sysname != "Linux":
        return "storage errors are injected with LD_PRELOAD, on Linux alone"
    return None if _compiler() else "no C compiler (gcc, cc, clang) to build tests/faults/storage_errors.c with"


def library(source: Path = SOURCE) -> Path:
    """A shared library of one C file, built once per version of its source, for this user.

    Raises:
        RuntimeError: it does not compile, or there is no compiler.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(str(why_unavailable()))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"{source.stem}-{os.getuid()}-{digest}.so"
    if not built.exists():
        fresh = built.with_name(f".{built.name}.{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", str(fresh), str(source), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
        os.replace(fresh, built)
    return built


def preloaded(source: Path, variables: Mapping[str, str], before: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for processes that load the library of a C file, and what `before` loads, into all that they start.

    Args:
        variables: what the library reads.
    """
    loaded = f"{library(source)} {before.get('LD_PRELOAD', '')}".strip()
    return {**variables, "LD_PRELOAD": loaded, "RAY_LD_PRELOAD_ON_WORKERS": "1"}


class StorageErrors:
    """Faults of the files below some folders, in all processes started with `environment`; none until one is set.

    Args:
        control: a file to write, best outside the folders.
        folders: whose files fail; links in their own paths are followed.
    """

    def __init__(self, control: Path, folders: Iterable[Path], seed: int = 0) -> None:
        joined = "".join(f"{Path(folder).resolve()}:" for folder in folders).encode()
        if len(joined) >= _FOLDERS_BYTES:
            raise ValueError(f"the folders' paths have {len(joined)} bytes together, at most {_FOLDERS_BYTES - 1} fit")
        control.write_bytes(bytes(_Control(seed=seed, capacity=-1, folders=joined)))
        self._path = control.resolve()
        with open(control, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._control = _Control.from_buffer(self._memory)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment; processes that it starts inherit it (Ray's workers included)."""
        return preloaded(SOURCE, {"STORAGE_ERRORS": str(self._path)})

    @property
    def counts(self) -> Counts:
        return Counts(self._control.failed, self._control.full)

    def err(self, rate: float, error: int = errno.EIO, kinds: int = READ | WRITE | SYNC | OPEN) -> None:
        """That share of the calls of these kinds fails with `error`; 0 ends it."""
        self._control.error, self._control.kinds, self._control.rate = error, kinds, rate

    def full_after(self, capacity: int | None) -> None:
        """Writes fail with ENOSPC once all processes have written that many bytes from now on; None ends it."""
        self._control.capacity = -1 if capacity is None else capacity

    def read_only(self, on: bool = True) -> None:
        """Whatever would change a file or a folder fails with EROFS."""
        self._control.read_only = int(on)

    def close(self) -> None:
        """Ends the faults of processes that still run."""
        self.err(0)
        self.full_after(None)
        self.read_only(False)
        del self._control
        self._memory.close()

    def __enter__(self) -> StorageErrors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _compiler() -> str | None:
    return next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)
