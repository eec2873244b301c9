"""Pixels from bytes: every kind of file, and every kind of broken file."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grappa_dist.data.transforms import BadImage, Preprocess, decode, view_generator


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 100) + b"IDAT"


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 300, 32768, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(grey), "PNG")))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(40, 30).convert(mode)
    data = encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    pixels = decode(data)
    assert (pixels.mode, pixels.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(pixels, float) - np.asarray(image.convert("RGB"), float)).mean() < 12


def test_what_is_transparent_becomes_white() -> None:
    black = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    palette = Image.new("P", (3, 2), 0)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    grey = Image.new("LA", (3, 2), (0, 0))
    for data in (
        encoded(black, "PNG"),
        encoded(black, "WEBP", lossless=True, exact=True),
        encoded(palette, "PNG", transparency=0),
        encoded(grey, "PNG"),
        encoded(Image.new("RGB", (3, 2)), "PNG", transparency=(0, 0, 0)),
    ):
        assert np.asarray(decode(data)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_as_pillow_does(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(16, 8), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_image_readable() -> None:
    plain = encoded(picture(16, 8), "JPEG")
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"):
        assert decode(encoded(picture(16, 8), "JPEG", exif=exif)).tobytes() == decode(plain).tobytes()


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.asarray(decode(data))[0, 0, 0] > 200


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    for side in (9000, 40_000, 2**31 - 1):
        with pytest.raises(BadImage, match=r"pixels|bomb"):
            decode(png_header(side, side))


@pytest.mark.filterwarnings("ignore:Image size", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_any_bytes_decode_or_are_a_bad_image(format: str) -> None:
    whole = encoded(picture(40, 30), format)
    rng = random.Random(0)
    for trial in range(400):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(len(data), 200 if trial % 2 else len(data)))] = rng.randrange(256)
        with contextlib.suppress(BadImage):
            assert decode(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_images_are_bad(format: str) -> None:
    whole = encoded(picture(200, 150), format)
    for length in (0, 1, 10, len(whole) // 4, len(whole) // 2):
        with pytest.raises(BadImage, match=r"\w"):
            decode(whole[:length])


def test_text_and_formats_that_are_not_read_are_bad() -> None:
    for data in (b"<html>404</html>", b"\0" * 1000, encoded(picture(8, 8), "TIFF"), encoded(picture(8, 8), "PPM")):
        with pytest.raises(BadImage, match="identify"):
            decode(data)


@pytest.mark.parametrize("size", [(100, 60), (60, 101), (33, 33), (500, 320), (20, 31), (1, 1), (37, 900)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_centre_crop_is_resize_then_crop(size: tuple[int, int], interpolation: str, crop_pct: float) -> None:
    image, side = picture(*size), 32
    shorter = int(side / crop_pct)
    scaled = tuple(shorter if edge == min(size) else int(shorter * edge / min(size)) for edge in size)
    left, top = (round((edge - side) / 2.0) for edge in scaled)
    resized = image.resize(scaled, Image.Resampling[interpolation.upper()])  # type: ignore[arg-type]
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=int)
    found = Preprocess(side, "crop", interpolation, crop_pct).test(image)
    assert found.shape == (side, side, 3)
    assert found.dtype == np.uint8
    if max(size) < 8 * min(size):
        assert np.array_equal(found, expected)
    elif interpolation != "nearest":
        assert np.abs(found - expected).max() <= 1


def test_squash_keeps_the_whole_image() -> None:
    image = picture(50, 20)
    assert np.array_equal(
        Preprocess(16, "squash").test(image), np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    )


def test_a_very_long_image_costs_no_more_than_its_crop() -> None:
    for size in ((1, 20_000), (20_000, 1), (3, 2)):
        preprocess = Preprocess(224)
        assert preprocess.test(Image.new("RGB", size)).shape == (224, 224, 3)
        assert preprocess.augment(Image.new("RGB", size), view_generator(0, 0, 0, 0), 0.1).shape == (224, 224, 3)


def test_a_grey_or_transparent_pil_image_is_taken_as_it_is() -> None:
    for mode in ("L", "RGBA", "P"):
        assert Preprocess(8).test(picture(9, 8).convert(mode)).shape == (8, 8, 3)


def test_an_augmentation_is_a_function_of_seed_epoch_row_and_view() -> None:
    image, preprocess = picture(64, 48), Preprocess(16)

    def view(*name: int) -> bytes:
        return preprocess.augment(image, view_generator(*name), 0.2).tobytes()

    assert view(1, 2, 3, 4) == view(1, 2, 3, 4)
    names = [(1, 2, 3, 4), (0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 2**40, 4), (2, 1, 3, 4)]
    assert len({view(*name) for name in names}) == len(names)


def test_augmented_crops_keep_to_area_and_aspect_and_flip_half() -> None:
    width, height = 400, 300
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    place = np.stack([x * 255 / width, y * 255 / height, 0 * x], axis=2).astype(np.uint8)
    preprocess, flips, areas = Preprocess(64, interpolation="nearest"), 0, []
    for row in range(200):
        pixels = preprocess.augment(Image.fromarray(place), view_generator(0, 0, row, 0), 0.3).astype(float)
        across, down = pixels[0, -1, 0] - pixels[0, 0, 0], pixels[-1, 0, 1] - pixels[0, 0, 1]
        flips += across < 0
        w, h = (abs(across) * 64 / 63 + 2) * width / 255, (down * 64 / 63 + 2) * height / 255
        areas.append(w * h / (width * height))
        assert 0.70 < w / h < 1.40
    assert 0.28 < min(areas) < 0.45
    assert 0.85 < max(areas) < 1.05
    assert 70 < flips < 130


def test_wrong_settings_are_refused_by_name() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "resize": "pad"}, "resize"),
        ({"image_size": 8, "interpolation": "cubic"}, "interpolation"),
        ({"image_size": 8, "crop_pct": 0.0}, "crop_pct"),
    ]
    for settings, name in wrong:
        with pytest.raises(ValueError, match=name):
            Preprocess(**settings)
    with pytest.raises(ValueError, match="min_scale"):
        Preprocess(8).augment(picture(8, 8), view_generator(0, 0, 0, 0), 0.0)
