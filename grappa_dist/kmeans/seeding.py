"""First centroids over the rows of all ranks, by k-means++ or k-means||: the same on any number of ranks.

k-means++ (Arthur and Vassilvitskii, 2007) draws each centroid in proportion to the squared distance (D^2) from those
before it. Here it draws in rounds: many candidates at once, which are thinned out so that they have the distribution of
one draw at a time (`accept`). So rows are read once a round instead of K times.

k-means|| (Bahmani et al., Scalable K-Means++, 2012) needs a few passes over the rows for any K. Rounds draw many rows
by their D^2 weights, in all more rows than centroids. k-means++ picks the centroids among them, each weighted by the
number of rows that it is the nearest to. The paper draws each row independently, so that a round has about l rows; here
it has exactly l: those with the shortest exponential waiting times with D^2 as the rate (`kmeans.sampling.race_keys`).

What is drawn and which draws are kept are functions of integers only.

Shapes: n rows of this rank, P of one block, K centroids, k of them found so far, M candidates of all ranks, m
candidates of one round or rows to be read, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grappa_dist.data.rng import RowDraw, draw
from grappa_dist.distributed.device_rows import DeviceBlock
from grappa_dist.distributed.sharded_rows import RowBlock, ShardedRows, scratch
from grappa_dist.kmeans.sampling import Draw, copy_rows
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.dense import DenseCentroids, nearest_dense
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square
from grappa_dist.search.in_flight import Work
from grappa_dist.search.rerank import FAR, Assignment, assign

Init = Literal["k-means++", "k-means||"]

_TABLE = 2048  # candidates whose distances to each other are one square table
_SHARE = 64  # a round has at most 1 / 64 of the centroids as candidates, where that is more than one table
LARGER_ROUNDS_ABOVE = _TABLE * _SHARE  # centroids
OVERSAMPLING_ROUNDS = 5  # of k-means||, after its first row
_SHIFT = 21  # from units of 2**-48 to units of 2**-27
_AT_ONCE = 2**14  # centroids that a block of rows is compared with, so that their table of distances stays small
_READ = 256  # rows that are read individually between two checks for a requested stop


@dataclass(frozen=True, eq=False)
class SeedingCandidates:
    """Rows of all ranks from which k-means|| picks the centroids."""

    places: Tensor  # (M,) int64 among all rows, ascending
    times: Tensor  # (M,) int64, multiplicity: how many rows each of them is the nearest to


@dataclass(frozen=True, eq=False)
class SeedingState:
    """The state of an initialisation after a round; everything else follows from the rows, so it can be resumed."""

    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (k,) among all rows, by round
    drawn: int = 0  # rows so far, including those that were dropped
    candidates: SeedingCandidates | None = None  # from which places are drawn, if not from all rows


OnRound = Callable[[SeedingState, int], None]
"""Called after each round with the state, and with how many rows the present part of the initialisation draws."""


def ignore_round(seeded: SeedingState, wanted: int) -> None:
    """The default of `on_round`."""


def seed_places(
    sharded: ShardedRows,
    num_labels: int,
    seed: int,
    *,
    resume: SeedingState | None = None,
    on_round: OnRound = ignore_round,
    at_once: int | None = None,
) -> Tensor:
    """Places of k-means++ centroids, (K,), by `draw_centroids`; rows that were not drawn, the lowest first, fill up.

    Args:
        resume: the last state passed to `on_round`, of the same rows, K and seed.
        at_once: of `D2Weights`.

    Raises:
        ValueError: the places in `resume` are not of good rows.
        Stopped: on all ranks, when a stop was requested on any of them.
    """
    weights = D2Weights.of(sharded, at_once=at_once)
    places = draw_centroids(weights, num_labels, seed, resume or SeedingState(), on_round).places
    missing = num_labels - len(places)
    return torch.cat([places, _lowest_left(sharded, places, missing)]) if missing else places


def draw_centroids(
    weights: D2Weights, num_labels: int, seed: int, resume: SeedingState, on_round: OnRound = ignore_round
) -> SeedingState:
    """k-means++: each centroid is a row drawn in proportion to its squared distance from those before it.

    A round draws up to half as many candidates as there are centroids and thins them out so that they have the
    distribution of one draw at a time (`accept`). So the rows are read once a round, by matrix products, instead of K
    times. Draws are integers below an integer total, located in the order of all rows.

    Returns:
        The last state, with places of K centroids, or of fewer when no row is left at a distance.
    """
    seeded = resume
    if len(resume.places):
        check_places(weights, resume, num_labels)
        weights.lower_to([resume.places])
    while len(seeded.places) < num_labels and any(totals := weights.totals()):
        seeded = _round(weights, totals, seeded, num_labels=num_labels, seed=seed)
        on_round(seeded, num_labels)
    return seeded


def _round(weights: D2Weights, totals: list[int], before: SeedingState, *, num_labels: int, seed: int) -> SeedingState:
    """Draws candidates, thins them out and lowers the weights; the state after it."""
    missing = num_labels - len(before.places)
    numbers = range(before.drawn, before.drawn + candidates_per_round(len(before.places), missing))
    targets = [draw(sum(totals), *RowDraw.CANDIDATE.key(seed, num_labels, j)) for j in numbers]
    places, found = weights.locate(targets, totals)
    candidates = rows_at(weights.sharded, places)
    tests = [
        draw(weight, *RowDraw.CANDIDATE_TEST.key(seed, num_labels, j)) for j, weight in zip(numbers, found, strict=True)
    ]
    kept = accept(candidates, found, tests, missing)
    weights.lower([candidates[kept]], len(before.places))
    return SeedingState(torch.cat([before.places, places[kept]]), numbers.stop)


def check_places(weights: D2Weights, resume: SeedingState, at_most: int) -> None:
    """Raises ValueError on all ranks unless the places are different good rows, not more than can have been drawn."""
    sharded, places = weights.sharded, resume.places
    own = places[on_this_rank(sharded, places)] - sharded.first
    good, differ = int(sharded.total((weights.squares[own] > 0).sum()[None])), len(places.unique())
    if not (good == differ == len(places) <= min(at_most, resume.drawn)):
        raise ValueError(
            f"resume has {len(places)} rows drawn from {resume.drawn} candidates, of which {differ} differ and "
            f"{good} are good rows; expected as many good rows, all different, up to {at_most} of them"
        )


def _lowest_left(sharded: ShardedRows, drawn: Tensor, num: int) -> Tensor:
    """Places of the lowest good rows of all ranks that are not among those drawn, (num,)."""
    own = drawn[on_this_rank(sharded, drawn)] - sharded.first
    left = sharded.rows.num_good - len(own)
    slot = sum(int(n) for n in sharded.gather(torch.tensor([left]))[: sharded.comm.rank])  # left on lower ranks
    places = torch.zeros(num, dtype=torch.int64)
    for positions in sharded.good_positions():
        free = positions[~torch.isin(positions, own)][: max(0, num - slot)]
        places[slot : slot + len(free)] = free + sharded.first
        slot += len(free)
        if slot >= num:
            break
    return sharded.total(places)


def oversampled_places(
    sharded: ShardedRows,
    num_labels: int,
    seed: int,
    *,
    resume: SeedingState | None = None,
    on_round: OnRound = ignore_round,
    at_once: int | None = None,
) -> Tensor:
    """Places of k-means|| centroids, (K,).

    Where fewer than K of the candidates differ, k-means++ continues among all rows.

    Args:
        resume: the last state passed to `on_round`, of the same rows, K and seed.
        at_once: of `D2Weights`.

    Raises:
        ValueError: the places in `resume` are not of good rows.
        Stopped: on all ranks, when a stop was requested on any of them.
    """
    picked = resume or SeedingState()
    candidates = picked.candidates
    if candidates is None:
        weights = D2Weights.of(sharded, nearest=True, at_once=at_once)
        candidates = _seed_candidates(weights, num_labels, seed, picked, on_round)
        picked = SeedingState(candidates=candidates)
        on_round(picked, num_labels)
    else:
        _check_picked(sharded, candidates, picked)

    def report(now: SeedingState, wanted: int) -> None:
        on_round(_among_all(candidates, now), wanted)

    weights = _weights_of(sharded, candidates, at_once)
    before = SeedingState(torch.searchsorted(candidates.places, picked.places), picked.drawn)
    seeded = _among_all(candidates, draw_centroids(weights, num_labels, seed, before, report))
    if len(seeded.places) == num_labels:
        return seeded.places
    return seed_places(sharded, num_labels, seed, resume=seeded, on_round=on_round, at_once=at_once)


def _among_all(candidates: SeedingCandidates, seeded: SeedingState) -> SeedingState:
    """A state with places among all rows, from one with places among the candidates."""
    return SeedingState(candidates.places[seeded.places], seeded.drawn, candidates)


def _weights_of(sharded: ShardedRows, candidates: SeedingCandidates, at_once: int | None) -> D2Weights:
    """Weights of copies of the candidates, which count `times`."""
    here = on_this_rank(sharded, candidates.places)
    own = candidates.places[here] - sharded.first
    sample = copy_rows(sharded, own.split(sharded.block_rows) if len(own) else (), len(own))
    return D2Weights.of(sample, times=candidates.times[here], at_once=at_once)


def _check_picked(sharded: ShardedRows, candidates: SeedingCandidates, picked: SeedingState) -> None:
    """Raises ValueError on all ranks unless the candidates are different good rows, and include those picked."""
    check_places(D2Weights.of(sharded), SeedingState(candidates.places, len(candidates.places)), sharded.num_good)
    if not bool(torch.isin(picked.places, candidates.places).all()):
        raise ValueError("resume has picked rows that are none of its candidates")


def _seed_candidates(
    weights: D2Weights, num_labels: int, seed: int, seeded: SeedingState, on_round: OnRound
) -> SeedingCandidates:
    of_round = rows_per_oversampling_round(num_labels)
    wanted, sharded, found = 1 + OVERSAMPLING_ROUNDS * of_round, weights.sharded, seeded.places
    if len(found):
        check_places(weights, seeded, wanted)
        rounds = (found[:1], *found[1:].split(of_round))  # as they were drawn: of equal weights the first round counts
        weights.lower_to([some for some in rounds if len(some)])
    while len(found) < wanted and any(weights.totals()):
        num = of_round if len(found) else 1
        key = RowDraw.OVERSAMPLED.key(seed, num_labels, len(found))
        new = _places(sharded, Draw.of(sharded, num, *key, weights=weights.squares.cpu()))
        weights.lower_to([new], len(found))
        found = torch.cat([found, new])
        on_round(SeedingState(found, len(found)), wanted)
    order = found.argsort()
    return SeedingCandidates(found[order], _times(weights, len(found))[order])


def _places(sharded: ShardedRows, drawn: Draw) -> Tensor:
    """Places of the drawn rows of all ranks, ascending, (m,)."""
    own = torch.cat([torch.zeros(0, dtype=torch.int64), *drawn.positions()]) + sharded.first
    sizes = torch.cat(sharded.gather(torch.tensor([len(own)])))
    places, before = torch.zeros(int(sizes.sum()), dtype=torch.int64), int(sizes[: sharded.comm.rank].sum())
    places[before : before + len(own)] = own
    return sharded.total(places)


def _times(weights: D2Weights, num: int) -> Tensor:
    """How many rows of all ranks each of `num` candidates is the nearest to, (M,)."""
    assert weights.nearest is not None
    times, nearest = torch.zeros(num, dtype=torch.int64), weights.nearest.cpu()
    for positions in weights.sharded.good_positions():
        times.index_add_(0, nearest[positions], torch.ones_like(positions))
    return weights.sharded.total(times)


@dataclass(frozen=True)
class D2Weights:
    """D^2 weights of this rank's rows, lowered in place as centroids are found."""

    sharded: ShardedRows
    squares: Tensor  # (n,) int64, in units of 2**-27; 0 for bad rows
    nearest: Tensor | None = None  # (n,) int32, the nearest centroid; of several with the same weight the first
    times: Tensor | None = None  # (n,) int64, multiplicity of each row; by default 1
    at_once: int | None = None  # found centroids in memory at the same time; by default all

    @staticmethod
    def of(
        sharded: ShardedRows, *, nearest: bool = False, times: Tensor | None = None, at_once: int | None = None
    ) -> D2Weights:
        """Equal weights of all good rows: the first centroid may be any of them."""
        num = (len(sharded.rows),)
        if sharded.dense is None:
            squares, labels = scratch(num, torch.int64), scratch(num, torch.int32) if nearest else None
        else:
            squares = torch.zeros(num, dtype=torch.int64, device=sharded.device)
            labels = squares.int() if nearest else None
            times = None if times is None else times.to(sharded.device)
        weights = D2Weights(sharded, squares, None if labels is None else labels.fill_(-1), times, at_once)
        weights._fill(1)
        return weights

    def _fill(self, value: int) -> None:
        """Gives all good rows the same weight."""
        if self.sharded.dense is not None:
            good = np.concatenate([*self.sharded.rows.good, np.zeros(0, dtype=bool)])
            self.squares.masked_fill_(torch.from_numpy(good).to(self.sharded.device), value)
            return
        for positions in self.sharded.good_positions():
            self.squares[positions] = value

    def totals(self) -> list[int]:
        """Sums of the weights of each rank."""
        return [int(total) for total in self.sharded.gather(self._with_multiplicity().sum()[None])]

    def locate(self, targets: list[int], totals: list[int]) -> tuple[Tensor, list[int]]:
        """Places among all rows, (m,), and squares of the rows on which targets below the sum of all totals fall.

        A target falls on the row at which the running sum of weights passes it.
        """
        lower_ranks = sum(totals[: self.sharded.comm.rank])
        ends = self._with_multiplicity().cumsum(0)
        own = [i for i, t in enumerate(targets) if 0 <= t - lower_ranks < totals[self.sharded.comm.rank]]
        found = torch.zeros(len(targets), 2, dtype=torch.int64)
        if own:
            wanted = torch.tensor([targets[i] - lower_ranks for i in own], device=ends.device)
            positions = torch.searchsorted(ends, wanted, right=True)
            found[own] = torch.stack([positions + self.sharded.first, self.squares[positions]], 1).cpu()
        places, squares = self.sharded.total(found).unbind(1)
        return places, squares.tolist()

    def lower(self, rounds: Sequence[Tensor], first: int = 0) -> None:
        """Lowers the weights to the distances from the nearest of some new centroids, in one pass over the rows.

        Args:
            rounds: centroids (m, D) each, in the order in which they were found; `first` were found before them.
        """
        if not first:
            self._fill(FAR)
        if self.sharded.dense is not None:
            self._lower_dense(rounds, first)
            return
        prepared = [[Centroids.of(part, self.sharded.generator) for part in some.split(_AT_ONCE)] for some in rounds]

        def work(block: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
            x, known = block.x, self.squares[block.positions].to(self.sharded.device)
            labels, before = torch.full_like(known, -1), first
            for parts, some in zip(prepared, rounds, strict=True):
                found = _nearest(x, block.squares, parts, from_weights(known))
                now = to_weights(found.squares)
                nearer = now < known
                known, labels = torch.where(nearer, now, known), torch.where(nearer, found.labels + before, labels)
                before += len(some)
            nearer = labels >= 0
            return block.positions[nearer.cpu()], known[nearer].cpu(), labels[nearer].int().cpu()

        for positions, squares, labels in self.sharded.each(work, self.sharded.row_blocks()):
            self.squares[positions] = squares
            if self.nearest is not None:
                self.nearest[positions] = labels

    def lower_to(self, rounds: Sequence[Tensor], first: int = 0) -> None:
        """The same with rows at some places (m,) for each round, of which no more than `at_once` are read at a time."""
        num = sum(map(len, rounds))
        if self.at_once is None or num <= self.at_once:
            self.lower([rows_at(self.sharded, places) for places in rounds], first)
            return
        for places in rounds:
            if len(places) <= self.at_once:
                self.lower([rows_at(self.sharded, places)], first)
            else:
                self._lower_in_parts(places.split(self.at_once), first)
            first += len(places)

    def _lower_in_parts(self, parts: Sequence[Tensor], first: int) -> None:
        """`lower` to one round of centroids in several passes, with the exact distances to the round in between."""
        assert self.sharded.dense is None
        if not first:
            self._fill(FAR)
        exact = scratch((len(self.squares),), torch.int64).fill_(FAR)
        labels = scratch((len(self.squares),), torch.int32).fill_(-1)
        for places in parts:
            rows = rows_at(self.sharded, places)
            prepared = [Centroids.of(part, self.sharded.generator) for part in rows.split(_AT_ONCE)]

            def work(block: RowBlock, prepared: list[Centroids] = prepared) -> tuple[Tensor, Assignment]:
                known = exact[block.positions]
                within = torch.minimum(from_weights(self.squares[block.positions]), known.double() / GRID**2)
                found = _nearest(block.x, block.squares, prepared, within)
                nearer = (found.squares < known).nonzero()[:, 0]
                return block.positions[nearer], Assignment(found.labels[nearer], found.squares[nearer])

            for positions, found in self.sharded.each(work, self.sharded.row_blocks()):
                exact[positions], labels[positions] = found.squares, (found.labels + first).int()
            first += len(places)
        for positions in self.sharded.good_positions():
            now, known = to_weights(exact[positions]), self.squares[positions]
            nearer = now < known
            self.squares[positions] = torch.where(nearer, now, known)
            if self.nearest is not None:
                self.nearest[positions] = torch.where(nearer, labels[positions], self.nearest[positions])

    def _lower_dense(self, rounds: Sequence[Tensor], first: int) -> None:
        """The same on a device, where the weights stay."""
        prepared = [DenseCentroids.of(Centroids.of(some, self.sharded.generator)) for some in rounds]

        def work(block: DeviceBlock) -> Work[None]:
            at, before = block.at(), first
            known = self.squares[at]
            labels = torch.full_like(known, -1)
            for some in prepared:
                found = yield from nearest_dense(block.rows, some, distances=True, within=from_weights(known))
                assert found.squares is not None
                now = to_weights(found.squares)
                labels = torch.where(now < known, found.labels + before, labels)
                known, before = torch.minimum(known, now), before + len(some)
            self.squares[at] = known
            if self.nearest is not None:
                self.nearest[at] = torch.where(labels >= 0, labels.int(), self.nearest[at])

        for _ in self.sharded.passes(work):
            pass

    def _with_multiplicity(self) -> Tensor:
        """Weights (n,) in which a row counts as often as `times` has it."""
        return self.squares if self.times is None else self.squares * self.times


def _nearest(x: Tensor, squares: Tensor, parts: Sequence[Centroids], within: Tensor) -> Assignment:
    """As `assign` with all parts at once; labels continue from part to part."""
    best = Assignment(torch.full_like(squares, -1, dtype=torch.int64), torch.full_like(squares, FAR, dtype=torch.int64))
    first = 0
    for part in parts:
        found = assign(x, part, squares=squares, within=within)
        nearer = found.squares < best.squares
        labels = torch.where(nearer, found.labels + first, best.labels)
        best = Assignment(labels, torch.minimum(found.squares, best.squares))
        within = torch.minimum(within, best.squares.double() / GRID**2)
        first += len(part.values)
    return best


def rows_at(sharded: ShardedRows, places: Tensor) -> Tensor:
    """Grid rows (m, D) at some places among all rows, on all ranks."""
    rows = torch.zeros(len(places), sharded.dim)
    own = on_this_rank(sharded, places).nonzero()[:, 0]

    def read(some: Tensor) -> tuple[Tensor, Tensor]:
        return some, sharded.rows.take(places[some] - sharded.first)

    for some, x in sharded.each(read, own.split(_READ) if len(own) else ()):
        rows[some] = x
    return sharded.total(rows).to(sharded.device)


def on_this_rank(sharded: ShardedRows, places: Tensor) -> Tensor:
    """Which places among all rows belong to this rank, (m,) bool."""
    return (places >= sharded.first) & (places < sharded.first + len(sharded.rows))


def to_weights(squares: Tensor) -> Tensor:
    """Squared distances from units of 2**-48 to units of 2**-27, rounded up so that only equal rows have 0.

    Each is at most 4 and a bit, so the weights of 2**33 rows add up to less than 2**63.
    """
    return -((-squares) >> _SHIFT)


def from_weights(weights: Tensor) -> Tensor:
    """The largest squared distances, float64, with at most these weights."""
    return weights.double() / 2**27


def candidates_per_round(num: int, missing: int) -> int:
    """How many rows a round draws when there are `num` centroids and `missing` are still to be found.

    More of them make fewer rounds; of those that lie near each other most are dropped.
    """
    return max(1, min(num // 2, missing, max(_TABLE, num // _SHARE)))


def rows_per_oversampling_round(num_labels: int) -> int:
    """How many rows each round of k-means|| draws: over all rounds 2.5 times as many as the centroids wanted.

    Of its paper's factors 0.1 to 10 per centroid (Bahmani et al., 2012, section 5) this is the least with which five
    rounds are more than enough.
    """
    return -(-num_labels // 2)


def accept(rows: Tensor, weights: Sequence[int], draws: Sequence[int], at_most: int) -> list[int]:
    """Which of m candidates become centroids, as ascending positions, so that these are distributed as by k-means++.

    Candidates were drawn in proportion to `weights`, their squared distances before this round. Taken in order, each is
    kept with probability (weight now) / (weight then), where the weight now is that of its distance from the centroids
    accepted so far. That is as if the distances of all rows had been updated after every single choice.

    Args:
        draws: for each candidate an integer drawn from [0, weight).
        at_most: no more are accepted than this.
    """
    squares = exact_square(rows)
    accepted: list[int] = []
    for first in range(0, len(rows), _TABLE):  # so no table has more than this many rows and columns
        block = range(first, min(first + _TABLE, len(rows)))
        now = np.asarray(weights[block.start : block.stop], dtype=np.int64)
        for start in range(0, len(accepted), _TABLE):
            now = np.minimum(now, _between(rows, squares, block, accepted[start : start + _TABLE]).min(1))
        between = _between(rows, squares, block, block)
        for i in block:
            if len(accepted) == at_most:
                return accepted
            if draws[i] < int(now[i - first]):
                accepted.append(i)
                now = np.minimum(now, between[i - first])
    return accepted


def _between(rows: Tensor, squares: Tensor, some: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """Weights (a, b) of some candidates by their distances from others."""
    a, b = list(some), list(others)
    table = squares[a][:, None] + squares[b] - 2 * exact_dot(rows[a], rows[b])
    return to_weights(table.long()).cpu().numpy()
