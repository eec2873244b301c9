from __future__ import annotations

import numpy as np
import torch

from grappa_dist.data.rng import draw
from grappa_dist.kmeans.sampling import HASH_BITS, RACE_BITS, race_keys, row_hashes


def splitmix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_the_mixing_is_that_of_splitmix64() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # its published first output for seed 0
    secret = draw(2**64, 7)
    for place in (0, 1, 12345, 2**40):
        expected = splitmix(splitmix(place) ^ secret) >> (64 - HASH_BITS)
        assert row_hashes(torch.tensor([place]), 7).tolist() == [expected]


def test_hashes_are_even_and_differ_by_key() -> None:
    places = torch.arange(100_000)
    a, b = row_hashes(places, 1), row_hashes(places, 2)
    assert int(a.min()) >= 0
    assert int(a.max()) < 2**HASH_BITS
    assert len(a.unique()) == len(a)
    counts = np.bincount((a >> (HASH_BITS - 6)).numpy(), minlength=64)
    assert np.square(counts - 100_000 / 64).sum() / (100_000 / 64) < 120  # chi square with 63 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])) < 0.015


def test_rows_that_come_first_are_drawn_in_proportion_to_their_weights() -> None:
    weights = torch.tensor([1, 2, 3, 10]) << 20
    wins = np.zeros(4)
    for key in range(4000):
        keys = race_keys(row_hashes(torch.arange(4), key), weights)
        wins[int(keys.argmin())] += 1
    expected = 4000 * np.array([1, 2, 3, 10]) / 16
    assert np.square(wins - expected).dot(1 / expected) < 16.3  # chi square with 3 degrees of freedom, 0.001


def test_light_rows_are_distinguished_by_the_bits_that_count() -> None:
    weights = torch.tensor([1, 2, 3, 10])
    wins = np.zeros(4)
    for key in range(4000):
        wins[int(race_keys(row_hashes(torch.arange(4), key), weights, 0).argmin())] += 1
    expected = 4000 * np.array([1, 2, 3, 10]) / 16
    assert np.square(wins - expected).dot(1 / expected) < 16.3  # chi square with 3 degrees of freedom, 0.001


def test_keys_of_the_heaviest_and_lightest_rows_fit() -> None:
    hashes = torch.tensor([0, 1, 2**HASH_BITS - 1])
    for weight in (1, 2**30):
        keys = race_keys(hashes, torch.full((3,), weight))
        assert int(keys.min()) >= 0
        assert int(keys.max()) < 2**RACE_BITS
        assert keys.tolist() == sorted(keys.tolist())
