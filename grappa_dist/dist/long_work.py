"""Work that takes some ranks of a job much longer than others, without a collective in it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch

from grappa_dist.dist.workers import RankContext, Stopped

_END = object()


def until_all_are_done(context: RankContext, work: Generator[None, None, None]) -> None:
    """Does this rank's work, piece by piece, and returns when every rank has done its own; all ranks call it together.

    A rank that waits in one collective gives up after `resources.collective_timeout_s`, however well the others get on.
    So ranks add up how many are through over and over, beside their work: a round lasts as long as the slowest piece
    of it, whoever still works never waits, and whoever is through waits for one round at a time.

    Args:
        work: gives back control after every piece; it is closed when this returns or raises.

    Raises:
        Stopped: on all ranks, when any was asked to stop.
    """
    done = False
    with closing(work):
        while True:
            flags = torch.tensor([done, context.stop_requested()], dtype=torch.int64, device=context.device)
            told = context.comm.begin_sum(flags)
            while not done:
                done = next(work, _END) is _END
                if told.ready():
                    break
            through, stopping = told.total().tolist()
            if stopping:
                raise Stopped
            if through == context.comm.size:
                return
