"""Thousands of damaged tars: each is refused with one clear error, or its rows are read or known to be bad."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.shards import ImageShards
from tests.data.test_shards import write_tar

Damage = Callable[[bytearray, np.random.Generator], bytearray]
MUTATIONS = 500  # of each kind and format
BLOCK = 512


def random_bytes(tar: bytearray, draws: np.random.Generator) -> bytearray:
    for place in draws.integers(0, len(tar), draws.integers(1, 9)):
        tar[place] = draws.integers(256)
    return tar


def cut(tar: bytearray, draws: np.random.Generator) -> bytearray:
    return tar[: draws.integers(len(tar))]


def header_with_a_valid_checksum(tar: bytearray, draws: np.random.Generator) -> bytearray:
    """Any field of some block may be anything, and the block says that it is a whole header."""
    start = int(draws.integers(len(tar) // BLOCK)) * BLOCK
    for place in draws.integers(0, BLOCK, draws.integers(1, 13)):
        tar[start + place] = draws.integers(256)
    tar[start + 148 : start + 156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + BLOCK])
    return tar


def blocks_moved(tar: bytearray, draws: np.random.Generator) -> bytearray:
    blocks = [tar[i : i + BLOCK] for i in range(0, len(tar), BLOCK)]
    places = draws.integers(0, len(blocks), 3)
    blocks.insert(int(places[0]), blocks.pop(int(places[1])))
    return bytearray().join(blocks[: len(blocks) - int(places[2] % 3)])


@pytest.mark.parametrize("damage", [random_bytes, cut, header_with_a_valid_checksum, blocks_moved])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_tar_is_refused_or_its_rows_are_read_or_bad(tmp_path: Path, format: int, damage: Damage) -> None:
    long = "d" * 70 + "/" + "e" * 80
    members = {f"{key}{suffix}": key.encode() * 90 for key in ("a", "b", long) for suffix in (".jpg", ".json", ".txt")}
    whole = write_tar(tmp_path / "whole.tar", members, format).read_bytes()
    draws, outcomes = np.random.default_rng(format), Counter[str]()
    for _ in range(MUTATIONS):
        (tmp_path / "t.tar").write_bytes(damage(bytearray(whole), draws))
        try:
            shards = ImageShards.open([tmp_path / "t.tar"], None)
        except ValueError:
            outcomes["refused"] += 1
            continue
        for row, data in enumerate(shards.images(range(len(shards)))):
            outcomes["bad" if isinstance(data, BadImage) else "read"] += 1
            assert shards.where(row)
            try:
                shards.labels(row)
            except ValueError:
                outcomes["bad labels"] += 1
    assert outcomes["read"] > MUTATIONS / 2
    assert outcomes["refused"] + outcomes["bad"] + outcomes["bad labels"] > 0
