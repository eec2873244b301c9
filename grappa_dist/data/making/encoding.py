"""The bytes of an image as they go into a shard: as they are, or made smaller."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image, features

from grappa_dist.data.decoding import BadImage, decode

QUALITY = 95


@dataclass(frozen=True)
class Encoded:
    """What is written for one image."""

    data: bytes
    suffix: str
    bad: str | None = None  # why it does not decode, where that was tried; such a file is kept as it is


def encoded(data: bytes, suffix: str, image_size: int | None) -> Encoded:
    """The image re-encoded to a shorter side of `image_size`; as it is where that is None or not smaller."""
    if image_size is None:
        return Encoded(data, suffix)
    try:
        image = decode(data)
    except BadImage as error:
        return Encoded(data, suffix, str(error))
    scale = image_size / min(image.size)
    if scale >= 1:
        return Encoded(data, suffix)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    if suffix == "png":
        image.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), "png")
    image.save(buffer, "JPEG", quality=QUALITY)
    return Encoded(buffer.getvalue(), "jpg")


def encoder() -> str:
    """What makes the bytes of a re-encoded image: other versions may make others."""
    versions = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "zlib", "webp")]
    return f"bicubic, JPEG {QUALITY} or PNG, {', '.join(versions)}"
