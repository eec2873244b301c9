"""From the bytes of a file to pixels. Shapes: S the side of what a model sees."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.data.randomness import generator

Pixels = NDArray[np.uint8]
MAX_PIXELS = 64 * 2**20  # more is taken for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # by content; files of the web often carry another format's suffix
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Readers let through whatever their parsers meet. Not MemoryError: it tells of the machine, and the row may be good.
_UNREADABLE = (
    *(
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        LookupError,
        ArithmeticError,
        TypeError,
        AttributeError,
        RuntimeError,
    ),
    *(AssertionError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
_LONG = 8  # from this aspect on, an image is not resized outside its crop
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """The bytes are no image that we read; the message says why."""


def decode(data: bytes) -> Image.Image:
    """The RGB image in a file, upright; of an animation the first frame.

    Raises:
        BadImage: for any bytes that do not give one.
    """
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        width, height = image.size
        if not 0 < width * height <= MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels; from 1 to {MAX_PIXELS} are decoded")
        image.load()
        return to_rgb(upright(image))
    except BadImage:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or "no message"
        raise BadImage(f"{type(error).__name__}: {reason}") from None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say."""
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except _UNREADABLE:  # broken EXIF leaves the pixels as good as they are
        return image
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: 16 bit scaled to 8, what is transparent on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bit grey, which a plain conversion would clip at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def view_generator(seed: int, epoch: int, row: int, view: int) -> np.random.Generator:
    """The generator of one augmented view: a function of these four, never of a worker."""
    return generator("view", seed, epoch, row, view)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the S x S pixels that a model sees; mean and std belong to the model."""

    image_size: int
    resize: Literal["crop", "squash"] = "crop"
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # side of the centre crop over the shorter side

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize must be crop or squash, got {self.resize!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    def test(self, image: Image.Image) -> Pixels:
        """The view of evaluation, (S, S, 3)."""
        width, height = image.size
        if self.resize == "squash":
            return self._resized(image, (0, 0, width, height))
        shorter = math.floor(self.image_size / self.crop_pct)
        wide, high = (shorter * side // min(width, height) for side in (width, height))
        left, top = round((wide - self.image_size) / 2), round((high - self.image_size) / 2)
        right, bottom = left + self.image_size, top + self.image_size
        if max(wide, high) <= _LONG * shorter:
            resized = to_rgb(image).resize((wide, high), INTERPOLATIONS[self.interpolation])
            return np.array(resized.crop((left, top, right, bottom)))
        # Resizing only what stays: one grey level away at most, and no strip of a billion pixels
        x, y = width / wide, height / high
        return self._resized(image, (left * x, top * y, min(width, right * x), min(height, bottom * y)))

    def augment(self, image: Image.Image, rng: np.random.Generator, min_scale: float) -> Pixels:
        """A random crop of at least `min_scale` of the area, resized, flipped half of the times, (S, S, 3)."""
        if not 0 < min_scale <= 1:
            raise ValueError(f"min_scale must lie in (0, 1], got {min_scale}")
        draws, at, flip = rng.random((10, 2)), rng.random(2), rng.random()  # as many for every image
        width, height = _crop_size(image.size, min_scale, draws)
        left, top = at[0] * (image.width - width), at[1] * (image.height - height)
        pixels = self._resized(image, (left, top, min(left + width, image.width), min(top + height, image.height)))
        return np.ascontiguousarray(pixels[:, ::-1]) if flip < 0.5 else pixels

    def _resized(self, image: Image.Image, box: tuple[float, float, float, float]) -> Pixels:
        side, method = self.image_size, INTERPOLATIONS[self.interpolation]
        return np.array(to_rgb(image).resize((side, side), method, box=box))


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
