"""Images to measure reading on: drawn ones that are as hard to decode as photographs, or the shards of a user."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grappa_dist.data.index import IMAGE_SUFFIXES
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter

DISTINCT = 32  # drawn images; more rows repeat them
_QUALITY = 90


def drawn_photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG whose spectrum falls as 1/f, as those of photographs do: about 0.6 bytes a pixel."""
    draws = np.random.default_rng(seed)
    noises = draws.standard_normal((2, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    fields = [np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width)) for noise in noises]
    light, hue = (field / field.std() for field in fields)
    pixels = 120 + 45 * np.stack([light + 0.3 * hue, light, light - 0.3 * hue], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def drawn_shards(folder: Path, rows: int, size: tuple[int, int], seed: int) -> tuple[ImageShards, str]:
    """Shards of drawn images, and what they are."""
    width, height = size
    photos = [drawn_photo(width, height, seed * DISTINCT + i) for i in range(min(rows, DISTINCT))]
    with ShardWriter(folder / "drawn", rows_per_shard=max(1, rows // 16)) as writer:
        for row in range(rows):
            writer.write(photos[row % len(photos)], "jpg")
    kib = sum(map(len, photos)) / len(photos) / 1024
    said = f"drawn: {rows} JPEGs of {width} x {height} pixels, {kib:.0f} KiB each, {len(photos)} different, seed {seed}"
    return ImageShards.open([folder / "drawn"], None), said


def users_shards(paths: Sequence[str]) -> tuple[ImageShards, str]:
    """The shards that paths name, indexed in memory, and what they are."""
    shards = ImageShards.open(list(paths), None)
    total = sum(int(shards.index(i)["size"].sum()) for i in range(len(shards.shards)))
    return shards, f"real: {len(shards)} images of {total / len(shards) / 1024:.0f} KiB in {len(shards.shards)} tars"


def image_of(sample: Mapping[str, Any]) -> bytes:
    """The image of a sample as webdataset gives it."""
    return next(bytes(sample[suffix]) for suffix in IMAGE_SUFFIXES if suffix in sample)
