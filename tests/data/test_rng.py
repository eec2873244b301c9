"""Purposes of random numbers: each has one name, and where keys of two are equal, what they draw is known."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.data.rng import Purpose, RowDraw, draw, generator, permutation, philox, torch_seed, view_generator
from grappa_dist.kmeans.sampling import HASH_BITS, row_hashes
from grappa_dist.kmeans.seeding import OVERSAMPLING_ROUNDS, rows_per_oversampling_round

PACKAGE = Path(__file__).parents[2] / "grappa_dist"
MORE_THAN_ONCE = {  # each on purpose; see the tables of data/rng.py
    "Purpose.DATA_SET_ORDER": 2,  # the demo's data set, and those of make_shards
    "Purpose.EVALUATION_SAMPLE": 2,  # queries of a gallery come from one or the other
    "Purpose.MAP": 2,  # with and without a second number
    "Purpose.FUSION": 2,  # one start for the fusion with and without labels
}
CAN_MEET = {  # pairs of forms whose keys can be equal
    ("CANDIDATE", "RESTART"),
    ("CANDIDATE", "FIT_SAMPLE"),
    ("CANDIDATE", "AGREEMENT"),
    ("CANDIDATE", "KNN_FIT_SAMPLE"),
    ("CANDIDATE_TEST", "OVERSAMPLED"),
    ("CANDIDATE_TEST", "HIERARCHICAL_START"),
    ("OVERSAMPLED", "KNN_RECALL"),
    ("HIERARCHICAL_START", "KNN_RECALL"),
}


def test_every_purpose_is_used_in_one_place_but_for_those_that_say_why() -> None:
    text = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    uses = Counter(re.findall(r"\b(?:Purpose|RowDraw)\.[A-Z_]+\b", text))
    named = {f"{table.__name__}.{one.name}" for table in (Purpose, RowDraw) for one in table}
    assert uses == {name: MORE_THAN_ONCE.get(name, 1) for name in named}


def test_no_two_purposes_have_one_tag() -> None:
    tags = {hashlib.sha256(purpose.value.encode()).digest()[:4] for purpose in Purpose}
    assert len(tags) == len(Purpose)


def test_values_are_the_same_in_every_version() -> None:
    assert philox(Purpose.VIEW, 1, 2).random_raw(2).tolist() == [1623937218446389595, 15671122661051141237]
    assert generator(Purpose.VIEW, 3).integers(1000) == 909
    assert permutation(5, Purpose.VIEW).tolist() == [4, 1, 3, 2, 0]
    assert torch_seed(Purpose.VIEW, 4, 5) == 2639553832750404871
    assert view_generator(1, 2, 3, 4).random() == generator(Purpose.VIEW, 1, 2, 3, 4).random()
    assert draw(10**18, *RowDraw.CANDIDATE.key(0, 64, 1)) == 118348137470695837


def test_lists_of_unlike_lengths_are_other_streams_but_for_none_and_zero() -> None:
    """Hence a demo data set is shuffled as `make_shards` with seed 0 shuffles one of as many images."""
    lists: list[tuple[int, ...]] = [(), (0, 0), (0, 0, 0), (1,), (1, 0), (2**32,), (0, 1)]
    assert len({tuple(philox(Purpose.DATA_SET_ORDER, *numbers).random_raw(2).tolist()) for numbers in lists}) == 7
    shuffled = [permutation(50, Purpose.DATA_SET_ORDER, *numbers).tolist() for numbers in ((), (0,), (1,))]
    assert shuffled[0] == shuffled[1] != shuffled[2]


def test_a_number_outside_64_bits_is_refused_by_its_purpose() -> None:
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"^order of shards: seeds .* must lie in .* got {number}$"):
            philox(Purpose.SHARD_ORDER, number)


def test_a_key_has_the_numbers_in_the_places_of_the_names() -> None:
    assert RowDraw.OVERSAMPLED.key(7, 64, 9) == (7, 64, 6, 9)
    assert RowDraw.RESTART.key(7, 2) == (7, 2, 0)
    with pytest.raises(AssertionError, match="RESTART takes"):
        RowDraw.RESTART.key(7, 2, 3)


def test_keys_of_two_forms_are_equal_in_the_listed_cases_alone() -> None:
    def can_meet(a: RowDraw, b: RowDraw) -> bool:
        return len(a.value) == len(b.value) and all(
            isinstance(x, str) or isinstance(y, str) or x == y for x, y in zip(a.value, b.value, strict=True)
        )

    assert {(a.name, b.name) for a, b in combinations(RowDraw, 2) if can_meet(a, b)} == CAN_MEET


def test_the_id_6_of_two_hashes_gives_one_key_in_one_epoch_for_9_and_10_labels_alone() -> None:
    def rounds(num_labels: int) -> set[tuple[int, ...]]:
        drawn = [1 + i * rows_per_oversampling_round(num_labels) for i in range(OVERSAMPLING_ROUNDS)]
        return {RowDraw.OVERSAMPLED.key(0, num_labels, rows) for rows in (0, *drawn)}

    equal = [
        (k, epoch) for k in range(1, 200) for epoch in range(50) if RowDraw.KNN_RECALL.key(0, k, epoch) in rounds(k)
    ]
    assert equal == [(9, 6), (10, 6)]


@pytest.mark.parametrize("total", [10**9 + 7, 2**63])  # a sum of weights may be any number, also a power of two
@pytest.mark.parametrize(
    "key",
    [RowDraw.FIT_SAMPLE.key(0, 64), RowDraw.OVERSAMPLED.key(0, 64, 1)],
    ids=["the sample and candidate 1", "a round of k-means|| and the test of candidate 6"],
)
def test_an_integer_and_hashes_of_rows_that_share_a_key_are_not_correlated(key: tuple[int, ...], total: int) -> None:
    """Over many seeds: where the candidate lies among the weights, against the hash of each of eight rows."""
    keys = [(seed, *key[1:]) for seed in range(4000)]
    assert keys[0] in (RowDraw.CANDIDATE.key(0, 64, 1), RowDraw.CANDIDATE_TEST.key(0, 64, 6))
    where = np.array([draw(total, *one) / total for one in keys])
    hashes = np.stack([row_hashes(torch.arange(8), *one).numpy() / 2**HASH_BITS for one in keys])
    for row in range(8):
        assert abs(np.corrcoef(where, hashes[:, row])[0, 1]) < 4 / np.sqrt(len(keys))
    lowest = hashes.argmin(1)  # the row that a sample of one takes
    chosen = [np.mean(where[lowest == row]) for row in range(8)]
    assert np.allclose(chosen, 0.5, atol=4 * np.sqrt(1 / 12 / (len(keys) / 8)))
