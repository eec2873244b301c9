"""Work that takes some ranks of a job much longer than others, without a collective in it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

import torch

from grappa_dist.distributed.collectives import Comm, wire_device
from grappa_dist.distributed.worker import RankContext, Stopped

_END = object()

Piece = TypeVar("Piece")


def until_all_are_done(context: RankContext, work: Generator[None, None, None]) -> None:
    """Does this rank's work, piece by piece, and returns when every rank has done its own, as `beside_others`."""
    for _ in beside_others(context.comm, work, context.stop_requested):
        pass


def beside_others(
    comm: Comm, pieces: Generator[Piece, None, None], stop_requested: Callable[[], bool]
) -> Generator[Piece, None, None]:
    """This rank's pieces of work; ends when those of every rank have. All ranks call it, and use it up, together.

    A rank that waits in one collective gives up after `resources.collective_timeout_s`, however well the others get on.
    So the ranks add up, over and over and in the background, how many of them have done all of their pieces. A rank
    that has pieces left works on while such a sum is under way, and begins the next one after the piece in which it
    came. A rank that has none left waits for the sum, which takes no longer than the slowest piece of the others.

    Args:
        pieces: does a piece of the work each time it is asked; it is closed when this ends or raises.
        stop_requested: asked before each sum.

    Raises:
        Stopped: on all ranks, after the pieces under way, when any was asked to stop.
    """
    device, done = wire_device(comm), False
    with closing(pieces):
        while True:
            told = comm.begin_sum(torch.tensor([done, stop_requested()], dtype=torch.int64, device=device))
            while not done:
                piece = next(pieces, _END)
                if piece is _END:
                    done = True
                else:
                    yield piece  # type: ignore[misc]
                if told.ready():
                    break
            through, stopping = told.total().tolist()
            if stopping:
                raise Stopped
            if through == comm.size:
                return
