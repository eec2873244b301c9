"""Builds of an index, each killed before another of its steps on disk; what a reader finds then, as lines of JSON.

    python -m tests.retrieval.killed_builds OLD NEW WORK

OLD: embeddings with an index. NEW: the same with other embeddings listed. A step is a sync, a rename or a removal. One
process imports everything once and forks for each build and each reader, before any threads have been started.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grappa_dist.console import Console
from grappa_dist.retrieval.faiss_index import Kind  # noqa: F401 - imported before the forks
from grappa_dist.retrieval.index import build_index, open_index

KILLED = 9


def killed_before(step: int) -> None:
    """Lets this process end, as by a kill, before its step of that number."""
    done = 0

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal done
            if isinstance(args[0], int) or os.path.exists(args[0]):  # else there is nothing to remove
                if done == step:
                    os._exit(KILLED)
                done += 1
            return call(*args, **options)

        return called

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counting(getattr(os, name)))


def forked(work: Callable[[], None]) -> int:
    """The exit status of work in a process of its own."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        os._exit(1)


def tell(folder: Path, step: int) -> None:
    """Prints what a reader finds, and which files there are."""
    index = open_index(folder)
    names = [index.collection.name(row) for row in range(len(index.collection))]
    hits = index.nearest(index.collection.parts[0].rows[:1], 3).rows.tolist()
    files = sorted(path.suffix for path in (folder / "search").iterdir() if path.name != "lock")
    print(json.dumps({"step": step, "names": names, "hits": hits, "files": files}))


def build(folder: Path) -> None:
    build_index(folder, folder / "model", Console())


def main(old: Path, new: Path, work: Path) -> None:
    import faiss  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    status = KILLED
    for step in range(100):
        folder = shutil.copytree(old, work / str(step))
        shutil.copytree(new, folder, dirs_exist_ok=True)

        def killed(folder: Path = folder, step: int = step) -> None:
            killed_before(step)
            build(folder)

        def told(folder: Path = folder, step: int = step) -> None:
            tell(folder, step)
            build(folder)
            tell(folder, -1)

        status = forked(killed)
        if forked(told) or status == 0:
            break


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
