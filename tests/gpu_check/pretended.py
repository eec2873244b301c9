"""A check on the pretend GPU (tests/gpu), with the sizes of a test: what it shows are tensors of mixed devices."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.gpu_check.checks import CHECKS, Machine
from grappa_dist.gpu_check.main import perform


def state_of(comm: Comm, name: str) -> tuple[str, str]:
    """The state of a check and its line."""

    @contextmanager
    def only_rank(
        device: torch.device, report: Any = lambda status: None, stop_requested: Callable[[], bool] = lambda: False
    ) -> Iterator[RankContext]:
        yield RankContext(comm, device, report, stop_requested)  # of the group that there is

    check = next(check for check in CHECKS if check.name == name)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for module in ("jobs", "training", "reading", "demo"):
            stack.enter_context(patch(f"grappa_dist.gpu_check.{module}.only_rank", only_rank))
        state, found, _ = perform(check, Machine(torch.device("cuda", 0), True, Path(folder)))
    return state, found.line()
