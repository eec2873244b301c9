"""The classifier of one partition, thrown away after training, its rows spread over the ranks of a job.

Every rank holds K / R classes with their Adam state and scores the images of all ranks against them (An et al., 2021).
Features travel to all ranks; a maximum, two sums of A numbers and one of (A, D) gradients are reduced over ranks:
nothing of size K travels. The engine would average gradients over ranks, and here they belong to different classes, so
the classifier is outside the engine. The formulas of Eq. (2) are in training/norm_softmax_loss.py.

Shapes: B images of this rank, A images of all ranks, D channels, K classes, k of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.checksums import damaged, load_array
from grappa_dist.data.rng import RowDraw
from grappa_dist.distributed.collectives import Comm
from grappa_dist.kmeans.sampling import HASH_BITS, row_hashes
from grappa_dist.search.in_flight import sent
from grappa_dist.training.checkpoints import RowShard
from grappa_dist.training.norm_softmax_loss import Scores, chunks, class_gradient, image_gradient, score_classes
from grappa_dist.training.optim import RowState, adam_step

_START_ROWS = 4096  # drawn or read at a time
_HASHED_ROWS = 2**16  # at a time: a core's cache


@dataclass(frozen=True)
class _Scored:
    """What `Classifier.step` needs of the images that were scored before it."""

    unit_z: Tensor  # (A, D)
    places: Tensor  # (A,) of their classes among this rank's active rows; -1: on another rank
    log_total: Tensor  # (A,)


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classes are scored and updated."""

    gamma: float
    weight_decay: float  # L2 added to the gradient
    sampled: float = 1.0  # probability that a class takes part in a step in which no image belongs to it
    seed: int = 0  # of the sampled classes


class Classifier:
    """Norm-softmax, Eq. (2), against K classes, and their Adam.

    A step of training is `begin`, `score` for every micro-batch, `step`. The classes' gradient is that of the mean
    loss over all images scored since `begin`, on all ranks.

    With `sampled` below 1 the softmax of a step is over its active classes only (An et al., 2022): those of its images
    and others by chance, the same on any number of ranks. The other rows do not change, nor does their Adam state,
    counts of steps included. Sums of exponentials then lack about 1 - `sampled` of the other classes, which lowers
    losses and gradients where these matter; the accuracy is that among the active classes.
    """

    def __init__(self, comm: Comm, device: torch.device, shape: tuple[int, int], settings: ClassifierSettings) -> None:
        """`shape` is (K, D)."""
        self.num_rows, self._dim = shape
        self.first, self.end = (self.num_rows * rank // comm.size for rank in (comm.rank, comm.rank + 1))
        self._comm, self._settings, self._device = comm, settings, device
        self.state = RowState.zeros(self.end - self.first, self._dim, device)
        self._active: Tensor | None = None  # (k',) places of this rank's active rows, ascending; None: all
        self._scored: list[_Scored] = []

    @torch.no_grad()
    def start(self, centroids: Path | None, rng: torch.Generator) -> None:
        """Fills the classes with unit rows: the directions of the partition's centroids, or random ones.

        The length matters although the cosine ignores it: Adam changes every entry by about the learning rate, so long
        rows hardly turn, and the adaptors would bend the features towards classes that stay where they started.

        Raises:
            DamagedArtifact: the file of centroids is not what was written.
            ValueError: it does not have K rows of D channels.
        """
        given = None if centroids is None else load_array(centroids)
        if given is not None and given.shape != (self.num_rows, self._dim):
            raise ValueError(f"{centroids} has shape {given.shape}, must be {(self.num_rows, self._dim)}")
        for start in range(0, self.end, _START_ROWS):
            end = min(start + _START_ROWS, self.num_rows)
            low, high = max(start, self.first), min(end, self.end)
            if given is None:  # every rank draws all rows
                block = torch.randn(end - start, self._dim, generator=rng)[max(low - start, 0) : high - start]
            elif low < high:
                block = torch.from_numpy(np.array(given[low:high], dtype=np.float32))
                if centroids is not None and not block.isfinite().all():
                    raise damaged(centroids, "has numbers that are not finite")
            if low < high:
                self.state.rows[low - self.first : high - self.first] = F.normalize(block, dim=1)

    def begin(self, step: int, labels: Tensor) -> None:
        """Begins a step, whose images come in one or more micro-batches.

        Classes are drawn on the host: how many are drawn decides shapes, and asking a GPU is a wait for it.

        Args:
            labels: (A,) of the step's images, on the CPU.
        """
        self._scored.clear()
        if self._settings.sampled < 1:
            active, local = self._drawn(step).numpy(), labels.numpy() - self.first
            active[local[(local >= 0) & (local < len(active))]] = True
            self._active = sent(torch.from_numpy(np.flatnonzero(active)), self._device)

    def score(self, z: Tensor, labels: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of this rank's images: the summed loss, a scalar with a gradient for z, and how many are classified right.

        All ranks call it equally often, with an empty batch where one has no images.

        Args:
            z: (B, D), of any length.
            labels: (A,) of all ranks' images in rank order, in [0, K), a part of those given to `begin`.
            sizes: images of each rank; those of this one are B.
        """
        rows, gamma = z.detach().float(), self._settings.gamma
        of_ranks = self._comm.gather(rows, sizes)
        unit_z = F.normalize(torch.cat(of_ranks), dim=1)  # (A, D)
        assert len(unit_z) == len(labels)
        places = self._places(labels)
        scores = score_classes(unit_z, lambda part: self.state.rows[self._rows(part)], self._num_active, places, gamma)
        scores = self._over_ranks(scores)
        self._scored.append(_Scored(unit_z, places, scores.log_total))
        unit_gradient = self._comm.sum_(scores.unit_gradient(gamma))
        before = sum(len(of_rank) for of_rank in of_ranks[: self._comm.rank])
        mine = slice(before, before + len(rows))
        gradient = image_gradient(unit_gradient[mine], rows)
        loss = scores.losses[mine].sum()
        correct = (scores.target >= scores.top)[mine].sum()
        return loss + ((z - z.detach()) * gradient).sum(), correct

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step of Adam for the classes, chunk by chunk: their gradient never exists as a whole."""
        unit_z, places, log_total = (
            torch.cat([getattr(scored, name) for scored in self._scored]) for name in ("unit_z", "places", "log_total")
        )
        for part in chunks(self._num_active, unit_z):
            where, gamma = self._rows(part), self._settings.gamma
            state = self.state.at(where)
            gradient = class_gradient(unit_z, state.rows, places - part.start, log_total, gamma).div_(len(unit_z))
            adam_step(state, gradient, learning_rate=learning_rate, weight_decay=self._settings.weight_decay)
            if isinstance(where, Tensor):
                self.state.put(where, state)
        self._scored.clear()

    def shard(self) -> RowShard:
        """This rank's classes with their Adam state, as checkpoints keep them."""
        return RowShard(self.first, self.state.tensors())

    def _over_ranks(self, scores: Scores) -> Scores:
        """Maximum, sum of exponentials and target logits over all classes; `pull` and `own` stay this rank's part."""
        scores = scores.below(self._comm.max_(scores.top.clone()))
        total, target = self._comm.sum_(torch.stack([scores.total, scores.target]))
        return Scores(scores.top, total, scores.pull, target, scores.own)

    def _drawn(self, step: int) -> Tensor:
        """(k,) bool on the CPU: whether a class of this rank is drawn for a step."""
        limit = int(self._settings.sampled * 2**HASH_BITS)
        key = RowDraw.CLASSES.key(self._settings.seed, step)
        blocks = torch.arange(self.first, self.end).split(_HASHED_ROWS)
        return torch.cat([row_hashes(block, *key) < limit for block in blocks])

    def _places(self, labels: Tensor) -> Tensor:
        """Places of the labels' classes among the active rows of this rank; -1: not among them."""
        local = labels - self.first
        own = (local >= 0) & (local < len(self.state.rows))
        return torch.where(own, local if self._active is None else torch.searchsorted(self._active, local), -1)

    def _rows(self, part: slice) -> slice | Tensor:
        return part if self._active is None else self._active[part]

    @property
    def _num_active(self) -> int:
        return len(self.state.rows if self._active is None else self._active)
