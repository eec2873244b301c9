"""Which of two models finds better neighbours, from answers to "do these two images show the same?".

The figure is precision at k: the share of right images among a query's k nearest others, in the mean over queries.
R-Precision needs R, the size of a class, which nobody knows without labels. Neighbours that both models find cancel in
the difference, so the others are asked about, in *couples*: a query with an image that only the model finds (answer y),
and the same query with one that only the other model finds (answer y'). Both have equally many of them, and each is in
one couple, the nearest with the nearest. With C couples of Q queries, over all of them

    precision at k of the model - that of the other = sum(y - y') / (Q k) = (C / (Q k)) mean(y - y').

Couples are asked in an order that is random as to the answers (hashes of names), so the first m are a simple random
sample without replacement at every m, and their mean is unbiased. A query is hard or easy for both models, so the
variance of y - y' is below that of two answers about different queries. Relevance answers about those documents alone
that tell systems apart are the approach of Carterette, Allan and Sitaraman (2006), sampled ones with an unbiased
estimate that of Aslam, Pavlu and Yilmaz (2006).

Intervals of 95 % are of these queries and images, without a statement about others: the adjusted Wald intervals of
Agresti and Min (2005) for matched pairs, and of Agresti and Coull (1998) for a share, with the correction for finite
populations, so that they end at the figure when all is answered. They hold for a number of answers that was settled
before: who stops when the figures please has looked several times.

Shapes: n images, Q queries, k neighbours, C couples, A pairs that both models find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = Any  # a number, or an array of them
Pair = tuple[int, int]  # two images, the lesser row first
Same = Mapping[Pair, float]  # answers: 1 same, 0 different, 0.5 unsure

_Z = 1.959964  # of the normal distribution, for 95 %
_POWER = _Z + 0.841621  # a difference of so many standard errors is shown by four samples in five
_COUPLES_OF_A_BLOCK = 2  # beside one pair that both find: a fifth of the answers says how good both are
_BLOCK = 2 * _COUPLES_OF_A_BLOCK + 1
_USUAL_SPREAD = 0.6  # standard deviation of y - y' that is expected before any answer; 0.5 to 0.6 was measured


@dataclass(frozen=True)
class Figure:
    """A fraction with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Questions:
    """What may be asked about two models, in the order in which it is asked."""

    k: int
    queries: int  # Q
    couples: Ids  # (C, 3) query, an image that only the model finds, one that only the other finds
    agreed: Ids  # (A, 2) query, an image that both find

    @property
    def differing(self) -> float:
        """The share of neighbours that differ, C / (Q k)."""
        return len(self.couples) / (self.queries * self.k)

    def first(self, most: int) -> list[Pair]:
        """At most so many different pairs, whole couples, in the order of asking; which model found one is hidden."""
        asked: dict[Pair, None] = {}
        for unit in self._units():
            new = [pair for pair in dict.fromkeys(unit) if pair not in asked]
            if len(asked) + len(new) > most:
                break
            asked |= dict.fromkeys(new)
        return list(asked)

    def _units(self) -> Iterator[list[Pair]]:
        for number, (query, mine, theirs) in enumerate(self.couples.tolist()):
            yield sorted([pair_of(query, mine), pair_of(query, theirs)])
            place, rest = divmod(number + 1, _COUPLES_OF_A_BLOCK)
            if rest == 0 and place <= len(self.agreed):
                query, found = self.agreed[place - 1].tolist()
                yield [pair_of(query, found)]

    def expected_half_width(self, answers: int) -> float:
        """Half of the interval of the difference that so many answers will give, roughly; 0 where all are answered."""
        couples = min(len(self.couples), max(1, _COUPLES_OF_A_BLOCK * answers // _BLOCK))
        left = 1 - couples / len(self.couples)
        return _Z * self.differing * _USUAL_SPREAD * math.sqrt(left / couples)


@dataclass(frozen=True)
class Comparison:
    """What follows from answers."""

    answers: int  # different pairs that are used
    unsure: int  # of them; each counts as half the same
    couples: int  # that are answered, of all C
    agreed: int  # pairs that both models find and that are answered
    difference: Figure  # precision at k of the model, less that of the other
    model: Figure | None  # precision at k; None where no pair that both find is answered
    other: Figure | None
    only_model: float  # share of right images among those that only the model finds
    only_other: float
    spread: float  # standard deviation of y - y', for `answers_for`

    @property
    def outcome(self) -> str:
        """ "better", "worse", "equal" where all is answered and the same, else "unsure"."""
        found = self.difference
        if found.low == found.high == 0:
            return "equal"
        return "better" if found.low > 0 else "worse" if found.high < 0 else "unsure"


def pair_of(one: int, other: int) -> Pair:
    return (one, other) if one < other else (other, one)


def questions_of(queries: Ids, model: Ids, other: Ids, names: Sequence[str]) -> Questions:
    """The couples and agreed pairs of two models, ordered by hashes of the names of their images.

    So another start, or another version of the collection, asks what is left in the same order.

    Args:
        queries: (Q,) rows.
        model, other: (Q, k) rows of the nearest images, nearest first, without the query itself.
        names: (n,) different ones.
    """
    couples, agreed = list[list[int]](), list[list[int]]()
    for query, mine, theirs in zip(queries.tolist(), model.tolist(), other.tolist(), strict=True):
        of_model, of_other = set(mine), set(theirs)
        only_mine = [row for row in mine if row not in of_other]
        only_theirs = [row for row in theirs if row not in of_model]
        couples += [[query, a, b] for a, b in zip(only_mine, only_theirs, strict=True)]
        agreed += [[query, row] for row in mine if row in of_other]
    return Questions(model.shape[1], len(queries), _shuffled(couples, 3, names), _shuffled(agreed, 2, names))


def some_queries(names: Sequence[str], most: int) -> Ids:
    """At most so many rows, ascending, drawn by the hashes of their names."""
    drawn = _shuffled([[row] for row in range(len(names))], 1, names)[:most, 0]
    return np.sort(drawn)


def _shuffled(units: list[list[int]], width: int, names: Sequence[str]) -> Ids:
    def key(unit: list[int]) -> bytes:
        text = "\0".join(names[row] for row in unit)
        return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogateescape"))

    return np.array(sorted(units, key=key), np.int64).reshape(-1, width)


def compare(questions: Questions, same: Same) -> Comparison | None:
    """What follows from the answers to the first couples and agreed pairs, up to the first that lacks one.

    Answers beyond (of another comparison) are not used: which pairs these are is not random. None: no couple has both.
    """
    couples, agreed = _answered(questions.couples, same), _answered(questions.agreed, same)
    if not couples:
        return None
    used = {pair: same[pair] for unit in (*couples, *agreed) for pair in unit}
    y = np.array([[same[pair] for pair in unit] for unit in couples])  # (m, 2)
    both = np.array([same[pair] for (pair,) in agreed])
    less, weight = y[:, 0] - y[:, 1], questions.differing
    sums = len(less), float(less.sum()), float((less**2).sum())
    low, high = matched_interval(*sums, len(questions.couples))
    _, variance = _adjusted(*sums, 1 - len(less) / len(questions.couples))
    model, other = (
        _precision([(y[:, side], len(questions.couples)), (both, len(questions.agreed))]) for side in (0, 1)
    )
    return Comparison(
        answers=len(used),
        unsure=sum(value == 0.5 for value in used.values()),
        couples=len(couples),
        agreed=len(agreed),
        difference=Figure(weight * float(less.mean()), weight * float(low), weight * float(high)),
        model=model,
        other=other,
        only_model=float(y[:, 0].mean()),
        only_other=float(y[:, 1].mean()),
        spread=math.sqrt(variance),
    )


def answers_for(questions: Questions, found: Comparison, gap: float) -> int:
    """How many answers would show a difference of `gap` (a fraction) in four cases of five, by the spread so far."""
    couples = (_POWER * questions.differing * found.spread / gap) ** 2
    couples = couples / (1 + couples / len(questions.couples))  # of a finite population
    return math.ceil(couples * _BLOCK / _COUPLES_OF_A_BLOCK)


def _answered(units: Ids, same: Same) -> list[list[Pair]]:
    """The pairs of the first units (of a query and what is found for it), up to one that lacks an answer."""
    found = list[list[Pair]]()
    for unit in units:
        query, *rows = unit.tolist()
        pairs = [pair_of(query, row) for row in rows]
        if any(pair not in same for pair in pairs):
            break
        found.append(pairs)
    return found


def matched_interval(count: Numbers, total: Numbers, squares: Numbers, population: int) -> tuple[Numbers, Numbers]:
    """The interval of the mean of values in [-1, 1], such as y - y'.

    Agresti and Min add half an observation to each of the four cells; here these fade as all is known.

    Args:
        count, total, squares: of the values that are known, how many, their sum and that of their squares; numbers, or
            arrays of one shape.
        population: how many values there are.
    """
    left = 1 - count / population
    centre, variance = _adjusted(count, total, squares, left)
    error = _Z * np.sqrt(np.maximum(0.0, left * variance / (count + 2 * left)))
    return np.maximum(-1.0, centre - error), np.minimum(1.0, centre + error)


def _adjusted(count: Numbers, total: Numbers, squares: Numbers, left: Numbers) -> tuple[Numbers, Numbers]:
    """Mean and variance with the added observations."""
    more = count + 2 * left
    return total / more, (squares + left - total**2 / more) / more


def _precision(strata: Sequence[tuple[NDArray[np.float64], int]]) -> Figure | None:
    """The share of right pairs over strata, each of some answers (m,) and of how many pairs these are a sample.

    None where one of the strata has pairs and no answer. Agresti and Coull add two right and two wrong answers.
    """
    pairs = sum(size for _, size in strata)
    value = centre = variance = 0.0
    for answers, size in strata:
        if size == 0:
            continue
        if not len(answers):
            return None
        weight, left = size / pairs, 1 - len(answers) / size
        count = len(answers) + 4 * left
        share = (float(answers.sum()) + 2 * left) / count
        value += weight * float(answers.mean())
        centre += weight * share
        variance += weight**2 * left * share * (1 - share) / count
    error = _Z * math.sqrt(variance)
    return Figure(value, max(0.0, centre - error), min(1.0, centre + error))
