"""A process that pretends to have a GPU, and forks one more for every rank of what it is asked to run.

    with PretendGpu() as gpu:
        (found,) = gpu.run("tests.gpu.workloads:embed_counts", images=16)

torch is changed for good there (tests/gpu/pretend.py), which the process of the tests must not see; importing
everything takes seconds, which forks do not. What a function is given and returns is JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.gpu import guard
from tests.gpu.counting import ROOT

IMPORTED = ("grappa_dist.pipeline", "timm", "deepspeed", "tests.gpu.workloads")  # once, for all forks
TIMEOUT_S = 300


class PretendGpu:
    """The client of such a process."""

    def __init__(self) -> None:
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
            process_group=0,  # so that its forks end with it
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, function: str, ranks: int = 1, *, products: bool = True, **given: Any) -> list[Any]:
        """What `function` ("module:name"), called with a `Comm` and `given`, returns on each of several ranks.

        A call that is left before it has its answer, as by the time limit of a test, ends what it began.

        Args:
            products: whether matrix products, convolutions and attention are computed, or are zeros of their shapes.

        Raises:
            RuntimeError: a rank fails, with its traceback.
        """
        if self._process.poll() is not None:
            self._process = self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([function, ranks, products, given]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BaseException:
            self._end()  # the next call would take the answer for its own
            raise
        if not answer:
            raise RuntimeError(f"the process with the pretend GPU has ended: {self._process.wait()}")
        found = json.loads(answer)
        if failed := [f"rank {rank} of {ranks}:\n{one['failed']}" for rank, one in enumerate(found) if "failed" in one]:
            raise RuntimeError("\n".join(failed))
        return [one["found"] for one in found]

    def __enter__(self) -> PretendGpu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ends it with its forks, whatever they do: nobody waits for that any more."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def serve() -> None:
    """Runs what the lines of stdin ask for, until there are no more."""
    guard.install()
    from tests.gpu import pretend

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    with pretend.pretend():  # so that DeepSpeed finds a GPU
        for name in IMPORTED:
            importlib.import_module(name)
    from tests.processes import free_address

    for line in sys.stdin:
        function, ranks, products, given = json.loads(line)
        how = nullcontext if products else pretend.without_products
        with tempfile.TemporaryDirectory() as folder:
            address = free_address()
            places = [(rank, ranks, address, Path(folder) / str(rank)) for rank in range(ranks)]
            with how():  # a fork takes it along
                _wait_for([_fork(function, given, place) for place in places])
            found = [json.loads(at.read_text()) if at.exists() else {"failed": "it died"} for *_, at in places]
        print(json.dumps(found), file=answers, flush=True)


def _fork(function: str, given: dict[str, Any], place: tuple[int, int, str, Path]) -> int:
    child = os.fork()
    if child == 0:
        try:
            found = {"found": run_rank(function, given, place[:3])}
        except BaseException:
            found = {"failed": traceback.format_exc()}
        fresh = place[3].with_suffix(".partial")
        fresh.write_text(json.dumps(found))
        fresh.rename(place[3])
        os._exit(0 if "found" in found else 1)
    return child


def _wait_for(children: list[int]) -> None:
    """Ends the others once one has failed: they would wait for it."""
    left = set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:
            for other in left:
                os.kill(other, 9)


def run_rank(function: str, given: dict[str, Any], place: tuple[int, int, str]) -> Any:
    """Runs a function on one rank of a process group that says it is NCCL's."""
    import torch

    from grappa_dist.distributed.collectives import process_group
    from tests.gpu.pretend import CUDA, pretend

    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    rank, ranks, address = place
    with pretend("nccl"), process_group(rank, ranks, address, timeout_s=TIMEOUT_S, device=CUDA) as comm:
        return getattr(importlib.import_module(module), name)(comm, **given)


if __name__ == "__main__":
    serve()
