"""What checks run on: rows that are the same to the bit on every machine, drawn images, an untrained ViT.

Shapes: P rows, D dimensions.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.distributed.collectives import process_group
from grappa_dist.distributed.worker import RankContext, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GRID_BITS = 24  # unit rows lie on multiples of 2**-24 (search/fixed_point.py)
_OF_GROUP, _OF_ROW = 2**10, 2**10  # bounds of the integers that a row is a sum of
_COPIES = 64  # every so manieth row is one before it, for ties
_BLOCK = 2**14


def raw(count: int, *key: int) -> NDArray[np.uint64]:
    """Random words (count,), a function of the key: the raw output of a generator made of integers alone."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count), dtype=np.uint64)


def unit_rows(num: int, dim: int, groups: int, seed: int) -> NDArray[np.float32]:
    """Unit rows (P, D) in groups, on the grid, the same bits on every machine.

    Sums of integers, divided by the square root of an integer: operations whose results IEEE 754 fixes to the last bit,
    unlike sines and logarithms. Every 64th row is a copy of another, so there are ties.
    """
    centres = _integers(groups * dim, _OF_GROUP, seed, 0).reshape(groups, dim)
    rows = np.empty((num, dim), dtype=np.float32)
    for number, start in enumerate(range(0, num, _BLOCK)):
        out = rows[start : start + _BLOCK]
        group = (raw(len(out), seed, 1, number) % np.uint64(groups)).astype(np.int64)
        found = centres[group] + _integers(out.size, _OF_ROW, seed, 2, number).reshape(out.shape)
        found[_COPIES - 1 :: _COPIES] = found[0 : len(found) - _COPIES + 1 : _COPIES]
        norms = np.sqrt((found * found).sum(1).astype(np.float64))
        out[:] = np.rint(found / norms[:, None] * 2**GRID_BITS) / 2**GRID_BITS
    return rows


def _integers(count: int, bound: int, *key: int) -> NDArray[np.int64]:
    """Integers (count,) in (-bound, bound): sums of two, so that small ones are more frequent."""
    words = raw(count, *key)
    low, high = (words & np.uint64(bound - 1)).astype(np.int64), (words >> np.uint64(32)).astype(np.int64)
    return low - (high & (bound - 1))


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256 of the bytes of arrays, with their shapes and types."""
    total = hashlib.sha256()
    for array in arrays:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        total.update(f"{little.dtype.str}{little.shape}".encode())
        total.update(little.tobytes())
    return total.hexdigest()


@lru_cache(maxsize=512)  # 256 of them, which take 5 s, are those of six checks
def photo(size_px: tuple[int, int], seed: int) -> bytes:
    """A random JPEG with large and small structures, about as large as a photograph's."""
    width, height = size_px
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize(size_px, Image.Resampling.BICUBIC)) / 3
    pixels += rng.normal(0, 6, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photos(folder: Path, rows: int, size_px: tuple[int, int], distinct: int) -> ImageShards:
    """Shards of drawn images, of which so many differ."""
    photos = [photo(size_px, seed) for seed in range(min(rows, distinct))]
    with ShardWriter(folder, rows_per_shard=-(-rows // 4)) as writer:
        for row in range(rows):
            writer.write(photos[row % len(photos)], "jpg")
    return ImageShards.open([folder], None)


def untrained_vit(name: str, image_size: int) -> nn.Module:
    """A model of timm with random weights, the same each time; `backbone.name` of jobs."""
    declare_torchvision_ops()
    import timm

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
    return model


@contextmanager
def only_rank(
    device: torch.device, report: Report = lambda status: None, stop_requested: Callable[[], bool] = lambda: False
) -> Iterator[RankContext]:
    """The context of the only rank of a job, in a process group of its own, as a worker gives it."""
    with process_group(0, 1, _free_address(), device=device) as comm:
        yield RankContext(comm, device, report, stop_requested)


def _free_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def largest_distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference in any of the tensors, as a share of that tensor's largest value; NaN where any is."""
    pairs = zip(found, expected, strict=True)
    shares = [(a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(shares).max())
