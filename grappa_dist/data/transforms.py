"""From an image to the pixels of a model: the view of tests, random views, and a fingerprint of this machine's pixels.

Shapes: H, W of the image, V views, S the side of the pixels.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from grappa_dist.data.decoding import Picture, Pixels, decode, open_picture

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS_VERSION = 2  # of our own arithmetic: raise it when the same image gives other pixels
_LONG = 8  # from this aspect on, an image is not resized outside its crop
# torch has these for bytes, some six times as fast as Pillow and within one grey level of it
_TORCH = ("bilinear", "bicubic")
_STEEPEST = 64  # torch's weights have 16 bits: too few to average more rows than this into one


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the S x S pixels that a model sees.

    The methods give bytes; the model normalises them by `mean` and `std` (models/backbone.py).
    """

    image_size: int = 224
    resize: Literal["crop", "squash"] = "crop"  # shorter side to image_size / crop_share, then the centre
    interpolation: str = "bicubic"
    crop_share: float = 1.0  # side of the centre crop over the shorter side
    mean: tuple[float, ...] = IMAGENET_MEAN  # of RGB in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize must be crop or squash, got {self.resize!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share must lie in (0, 1], got {self.crop_share}")

    def test(self, image: Picture | Image.Image) -> Pixels:
        """The view of evaluation, (S, S, 3), from pixels at full scale."""
        pixels, side = _picture(image).pixels(), self.image_size
        height, width = pixels.shape[:2]
        if self.resize == "squash":
            return self._resized(pixels, side, side)
        shorter = math.floor(side / self.crop_share)
        wide, high = (shorter * edge // min(width, height) for edge in (width, height))
        left, top = round((wide - side) / 2), round((high - side) / 2)
        if max(wide, high) <= _LONG * shorter:
            return np.ascontiguousarray(self._resized(pixels, high, wide)[top : top + side, left : left + side])
        # Resizing only what stays: one grey level away at most, and no strip of a billion pixels
        x, y = width / wide, height / high
        box = (left * x, top * y, min(width, (left + side) * x), min(height, (top + side) * y))
        return np.array(Image.fromarray(pixels).resize((side, side), INTERPOLATIONS[self.interpolation], box=box))

    def augment(self, image: Picture | Image.Image, rng: np.random.Generator, min_scale: float) -> Pixels:
        """A random crop of at least `min_scale` of the area, resized, flipped half of the times, (S, S, 3)."""
        return self.views(image, [rng], min_scale)[0]

    def views(self, image: Picture | Image.Image, rngs: Sequence[np.random.Generator], min_scale: float) -> Pixels:
        """Several augmentations of an image that is decoded once, (V, S, S, 3).

        It is decoded at 1/2, 1/4 or 1/8 where every crop still has as many pixels as the model sees.
        """
        if not 0 < min_scale <= 1:
            raise ValueError(f"min_scale must lie in (0, 1], got {min_scale}")
        picture, side = _picture(image), self.image_size
        crops = [draw_crop(picture.width, picture.height, min_scale, rng) for rng in rngs]
        spare = min(min(crop.width, crop.height) for crop in crops) / side
        pixels = picture.pixels(next((shrink for shrink in (8, 4, 2) if spare >= shrink), 1))
        views = np.empty((len(crops), side, side, 3), dtype=np.uint8)
        for view, crop in zip(views, crops, strict=True):
            resized = self._resized(crop.of(pixels, picture), side, side)
            view[...] = _as_array(_as_batch(resized).flip(3)) if crop.flip else resized
        return views

    def _resized(self, pixels: Pixels, high: int, wide: int) -> Pixels:
        """The pixels at another size, (high, wide, 3)."""
        height, width = pixels.shape[:2]
        if (height, width) == (high, wide):
            return pixels
        if self.interpolation not in _TORCH or max(height / high, width / wide) > _STEEPEST:
            return np.array(Image.fromarray(pixels).resize((wide, high), INTERPOLATIONS[self.interpolation]))
        resized = F.interpolate(_as_batch(pixels), (high, wide), mode=self.interpolation, antialias=True)
        return _as_array(resized)


def _as_batch(pixels: Pixels) -> Tensor:
    """The same memory as (1, 3, H, W); as the batch dimension is made first, torch sees the layout it is fast on."""
    return torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)


def _as_array(batch: Tensor) -> Pixels:
    array: Pixels = batch[0].permute(1, 2, 0).numpy()
    return array


def _picture(image: Picture | Image.Image) -> Picture:
    return image if isinstance(image, Picture) else Picture.of(image)


@dataclass(frozen=True)
class Crop:
    """A box of whole pixels inside an image, perhaps to be mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool

    def of(self, pixels: Pixels, picture: Picture) -> Pixels:
        """What the box holds of pixels that may have been decoded at a smaller scale."""
        high, wide = pixels.shape[:2]
        x, y = wide / picture.width, high / picture.height
        left, top = min(round(self.left * x), wide - 1), min(round(self.top * y), high - 1)
        right, bottom = round((self.left + self.width) * x), round((self.top + self.height) * y)
        return pixels[top : max(top + 1, bottom), left : max(left + 1, right)]


def draw_crop(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Crop:
    draws, at, flip = rng.random((10, 2)), rng.random(2), rng.random()  # as many for every image
    wide, high = (max(1, round(edge)) for edge in _crop_size((width, height), min_scale, draws))
    return Crop(round(at[0] * (width - wide)), round(at[1] * (height - high)), wide, high, bool(flip < 0.5))


def _crop_size(size: tuple[int, int], min_scale: float, draws: NDArray[np.float64]) -> tuple[float, float]:
    """Width and height of the first random crop that fits; else the largest one of an allowed aspect."""
    width, height = size
    area = width * height * (min_scale + (1 - min_scale) * draws[:, 0])
    aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * draws[:, 1])
    widths, heights = np.sqrt(area * aspect), np.sqrt(area / aspect)
    for w, h in zip(widths.tolist(), heights.tolist(), strict=True):
        if w <= width and h <= height:
            return w, h
    return min(width, height * 4 / 3), min(height, width * 4 / 3)


_JPEG = base64.b64decode(  # 34 x 26 pixels, chroma at half the resolution
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8ybqm"
    "x5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAARCAAaACID"
    "ASIAAhEBAxEB/8QAGQAAAgMBAAAAAAAAAAAAAAAAAwQAAQIF/8QAKRABAAEDAwIFBAMAAAAAAAAAAQIAAxEEITESEyJBUWFxBRRSkYHR8P/EABYB"
    "AQEBAAAAAAAAAAAAAAAAAAECAP/EABoRAAMBAQEBAAAAAAAAAAAAAAABEQIhEhP/2gAMAwEAAhEDEQA/AMWdHanJu3ZdURyvq0S5aSTJiSFMRRWI"
    "VtvRLTkmRecn6KJYvWrsWJLEkwS8s0zpSRy+mbbkoscuxsh7/wC8qZhGE7avUODZ4x7YplsR0z4ZHVtkXOWgT0kuklLEyW6xcfP8/FDjZEN9yXqf"
    "sqVUdNZYj2JOSpT88mBd7vNwhHJMwKcvqeVL/cR0wRlnqXB+NXblKMpkZIYdh+axqYkp+IHbO/rijI5blDWNQE5zuxJt3iRyU0XemPbnFwvI8b81"
    "yog/TxQUzj23p+0pJw48H90aU6DGnVI4i7HHFSkOkd0KlTSPTP/Z"
)


@cache
def pixels_class() -> str:
    """Ten hex digits, the same for all versions of libraries that give the same pixels.

    Names and versions of decoders would tell apart what is equal, and miss a library that was built otherwise.
    """
    picture, image = open_picture(_JPEG), decode(_JPEG)
    samples = [picture.pixels(), picture.pixels(2), np.array(image)]
    for name, method in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        samples += [Preprocess(size, "squash", name).test(picture) for size in (16, 40)]
        samples.append(np.array(image.resize((16, 16), method)))
    samples.append(Preprocess(16, "squash", "lanczos").test(Picture.of(image)))
    digest = hashlib.sha256(str(PIXELS_VERSION).encode())
    for pixels in samples:
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()[:10]
