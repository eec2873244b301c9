"""Random numbers named by what they are for, so that they depend on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_WORD = 2**32


def philox(purpose: str, *numbers: int) -> np.random.Philox:
    """The bit stream of a purpose and its numbers, each in 0 .. 2**64 - 1.

    Each number takes two words: numpy pads short entropy with zeros, so lists of unlike lengths could otherwise meet.
    """
    for number in numbers:
        if not 0 <= number < _WORD**2:
            raise ValueError(f"{purpose}: seeds and row ids must lie in 0 .. 2**64 - 1, got {number}")
    words = [half for number in numbers for half in (int(number) % _WORD, int(number) // _WORD)]
    tag = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return np.random.Philox(np.random.SeedSequence([tag, *words]))


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A generator on the bit stream of a purpose and its numbers."""
    return np.random.Generator(philox(purpose, *numbers))


def permutation(length: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """A shuffle of 0 .. length - 1, (length,).

    Sorted from raw bits, which stay the same in any version of numpy; Generator.permutation does not promise that.
    """
    return np.argsort(philox(purpose, *numbers).random_raw(length), kind="stable")
