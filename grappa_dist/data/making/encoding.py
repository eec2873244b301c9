"""The bytes of an image as they go into a shard: as they are, or made smaller."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image, features

from grappa_dist.data.decoding import FORMATS, BadImage, decode

QUALITY = 95
COPIED = {"jpg": "jpg", "jpeg": "jpeg", "png": "png", "webp": "webp", "jfif": "jpg", "jpe": "jpg"}  # -> in a shard
REWRITTEN = ("bmp", "gif", "tif", "tiff")  # become PNG: readers of shards expect the four suffixes above
TAKEN = (*COPIED, *REWRITTEN)


@dataclass(frozen=True)
class Encoded:
    """What is written for one image."""

    data: bytes
    suffix: str
    bad: str | None = None  # why it does not decode, where that was tried; such a file is kept as it is


def encoded(data: bytes, suffix: str, image_size: int | None) -> Encoded:
    """The image re-encoded to a shorter side of `image_size`; as it is where that is None or not smaller.

    What is rewritten becomes a PNG in any case: of an animation or of several pages the first.

    Args:
        suffix: of the file, one of TAKEN.
    """
    rewritten, kept = suffix in REWRITTEN, COPIED.get(suffix, "png")
    if not data:
        return Encoded(data, kept, "empty file")
    if image_size is None and not rewritten:
        return Encoded(data, kept)
    try:
        image = decode(data, (*FORMATS, "TIFF") if rewritten else FORMATS)
    except BadImage as error:
        return Encoded(data, kept, str(error))
    smaller = image if image_size is None else shrunk(image, image_size)
    if smaller is image and not rewritten:
        return Encoded(data, kept)
    buffer = BytesIO()
    if kept == "png":
        smaller.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), "png")
    smaller.save(buffer, "JPEG", quality=QUALITY)
    return Encoded(buffer.getvalue(), "jpg")


def shrunk(image: Image.Image, shorter_side: int) -> Image.Image:
    """The image at that shorter side; itself where it is no larger."""
    scale = shorter_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoder() -> str:
    """What makes the bytes of a re-encoded image: other versions may make others."""
    versions = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "zlib", "webp")]
    return f"bicubic, JPEG {QUALITY} or PNG, {', '.join(versions)}"
