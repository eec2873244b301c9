"""Features of an epoch's anchors as its training pass computed them, kept for the k-NN graph of the next epoch.

    knn/features-<epoch>/
      parts.json                                           the parts that all ranks have written, in order
      steps-<first>-<end>.<rank>-of-<ranks>.safetensors    rows (P,) ascending, and their unit features (P, D)

A part is on storage before the checkpoint of its last step is, and no part reaches over a checkpoint. A job that is
resumed knows the parts up to its step, whatever ranks wrote them, and makes the later ones again.

Shapes: P rows of one part, D channels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from grappa_dist.distributed.collectives import raise_together, said_by_rank_0
from grappa_dist.distributed.worker import RankContext, wait_for_slower_ranks
from grappa_dist.files import replacing, write_json
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.training.batches import TrainingImages

KEPT_ROWS = 65_536  # of all ranks, in memory at most
INDEX_FILE = "parts.json"


@dataclass(frozen=True)
class Part:
    """The steps [first, end), in one file of each rank."""

    first: int
    end: int
    ranks: int

    def file(self, rank: int) -> str:
        return f"steps-{self.first:09d}-{self.end:09d}.{rank}-of-{self.ranks}.safetensors"


class PassedFeatures:
    """Takes in what the steps computed, in order, and gives it back once the epoch is over; all ranks act together."""

    def __init__(self, context: RankContext, training: TrainingImages, folder: Path, epochs: int) -> None:
        self._context, self._training, self._folder, self._epochs = context, training, folder, epochs
        self._per_epoch = training.steps_per_epoch()
        self._on, self._since = False, 0  # whether features are wanted; the first step that is not on storage
        self._parts: list[Part] = []
        self._rows: list[NDArray[np.int64]] = []
        self._features: list[NDArray[np.float32]] = []

    def begin(self, step: int) -> None:
        """Readies for the steps from this one to the end of its epoch; nothing is kept where no graph needs it.

        Raises:
            ValueError: features of earlier steps of the epoch are not there.
        """
        epoch = step // self._per_epoch
        there = self._context.of_rank_0((self._folder / f"epoch-{epoch + 1}").exists())
        self._on = epoch + 1 < self._epochs and not there
        self._since, self._rows, self._features = step, [], []
        self._parts = self._parts_of(epoch, step) if self._on else []

    def add(self, rows: NDArray[np.int64], z: Tensor) -> None:
        """The anchors of the next step on this rank: row ids (P,) and un-normalised features (P, D)."""
        if self._on:
            self._rows.append(rows)
            self._features.append(to_grid(F.normalize(z.detach().float(), dim=1)).cpu().numpy())

    def full(self, step: int) -> bool:
        """Whether memory calls for `save`, before a step; the same on all ranks."""
        return self._on and (step + 1 - self._since) * self._training.global_batch > KEPT_ROWS

    def save(self, step: int) -> None:
        """Puts what came of the steps before this one on storage."""
        if not self._on or step == self._since:
            return
        comm, folder = self._context.comm, self._folder_of((step - 1) // self._per_epoch)
        part = Part(self._since, step, comm.size)
        rows, features = np.concatenate(self._rows), np.concatenate(self._features)
        order = np.argsort(rows)  # so that whoever reads a range of row ids reads one piece of the file
        with replacing(folder / part.file(comm.rank)) as temporary:
            save_file({"rows": rows[order], "features": features[order]}, temporary)
        comm.barrier()
        self._parts.append(part)
        if comm.rank == 0:
            write_json(folder / INDEX_FILE, [vars(p) for p in self._parts])
        comm.barrier()
        self._since, self._rows, self._features = step, [], []

    def read(self, epoch: int, path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """This rank's share of the good rows, ascending over the ranks, and their features in that epoch, at `path`.

        Raises:
            ValueError: on all ranks, where a part is missing, or a row is not there once.
            Stopped: on all ranks, when any was asked to stop.
        """
        comm, num = self._context.comm, len(self._training.images)
        lowest, end = (num * r // comm.size for r in (comm.rank, comm.rank + 1))
        ids = np.setdiff1d(np.arange(lowest, end), self._training.bad, assume_unique=True)
        folder, parts = self._folder_of(epoch), self._parts_of(epoch, (epoch + 1) * self._per_epoch)
        files = [folder / part.file(rank) for part in parts for rank in range(part.ranks)]
        absent = [file for file in files if not file.exists()]
        raise_together(comm, f"{absent[0]} is missing; {self._remedy()}" if absent else "")
        own = _Own(ids, path)
        wait_for_slower_ranks(self._context, own.take(files))
        wrong = ids[own.seen != 1]
        problem = f"{folder} has not one feature each of {len(wrong)} rows, row {wrong[0]} first" if len(wrong) else ""
        raise_together(comm, f"{problem}; {self._remedy()}" if problem else "")
        return ids, own.features

    def drop(self, epoch: int) -> None:
        """Once the graph that needed them is there; by rank 0 alone."""
        shutil.rmtree(self._folder_of(epoch), ignore_errors=True)

    def _folder_of(self, epoch: int) -> Path:
        return self._folder / f"features-{epoch}"

    def _parts_of(self, epoch: int, end: int) -> list[Part]:
        """The parts of an epoch up to a step, which they must reach; later ones are of an attempt that was killed."""
        path, reached = self._folder_of(epoch) / INDEX_FILE, epoch * self._per_epoch
        here = path.read_text() if self._context.comm.rank == 0 and path.exists() else "[]"
        told = [Part(**part) for part in json.loads(said_by_rank_0(self._context.comm, here))]
        parts = [part for part in told if part.end <= end]
        for part in parts:
            if part.first == reached:
                reached = part.end
        if reached != end:
            raise ValueError(f"{path} lacks features of the steps from {reached} to {end - 1}; {self._remedy()}")
        return parts

    def _remedy(self) -> str:
        return f"remove {self._folder.parent}, and its copy on a mirror, to train this fusion from its start"


class _Own:
    """The features of some rows (P, D), in a map once they are taken, and how often each row was found, (P,)."""

    def __init__(self, ids: NDArray[np.int64], path: Path) -> None:
        self._ids, self._path = ids, path
        self.seen, self.features = np.zeros(len(ids), dtype=np.int64), np.zeros((0, 0), dtype=np.float32)

    def take(self, files: Sequence[Path]) -> Generator[None, None, None]:
        """What the files have of them, one file after the other."""
        ids = self._ids
        for file in files:
            with safe_open(file, framework="numpy") as part:
                rows, table = part.get_tensor("rows"), part.get_slice("features")
                if not len(self.features):
                    self.features = _mapped(self._path, (len(ids), table.get_shape()[1]))
                first, after = np.searchsorted(rows, [ids[0], ids[-1] + 1]) if len(ids) else (0, 0)
                if first < after:
                    places = np.searchsorted(ids, rows[first:after])
                    assert np.array_equal(ids[places], rows[first:after]), f"{file} holds a bad row"
                    self.features[places] = table[first:after]
                    np.add.at(self.seen, places, 1)
            yield


def _mapped(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    if not shape[0]:
        return np.zeros(shape, dtype=np.float32)
    mapped: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    return mapped
