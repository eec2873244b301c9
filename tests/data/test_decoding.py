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

from grappa_dist.data.decoding import MAX_PIXELS, BadImage, _plain_jpeg, decode, open_picture
from tests.mutations import mutations


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
    for trial in range(mutations(400)):
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
        with pytest.raises(BadImage, match="no JPEG, PNG, WEBP, GIF or BMP that can be read; it begins with"):
            decode(data)


def test_a_reason_is_the_same_in_every_run() -> None:
    with pytest.raises(BadImage) as found:
        decode(b"<html>404</html>")
    assert str(found.value) == "no JPEG, PNG, WEBP, GIF or BMP that can be read; it begins with '<html>404</h'"


PLAIN: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 2},
    "comment": {"comment": b"\xff\xda" * 9, "icc_profile": bytes(70_000)},
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (8, 3), (65, 47), (160, 99)])
def test_the_fast_decoder_gives_pillows_pixels_to_the_bit(kind: str, mode: str, size: tuple[int, int]) -> None:
    if mode == "L" and kind == "RGB":
        pytest.skip("grey files have one channel")
    data = encoded(picture(*size).convert(mode), "JPEG", **PLAIN[kind])
    assert _plain_jpeg(data) is not None
    fast = open_picture(data)
    assert (fast.width, fast.height) == size
    assert np.array_equal(fast.pixels(), np.asarray(decode(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_the_fast_decoder_turns_photographs_as_pillow_does(orientation: int, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    data = encoded(picture(33, 17), "JPEG", **({"exif": exif} if where == "exif" else {"xmp": xmp}))
    assert _plain_jpeg(data) is not None
    fast, slow = open_picture(data), decode(data)
    assert (fast.width, fast.height) == slow.size
    assert np.array_equal(fast.pixels(), np.asarray(slow))
    assert fast.pixels(2).shape == (-(-fast.height // 2), -(-fast.width // 2), 3)


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_smaller_scale_is_that_of_pillows_draft(shrink: int) -> None:
    data = encoded(picture(176, 96), "JPEG")
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (176 // shrink, 96 // shrink))
    assert np.array_equal(open_picture(data).pixels(shrink), np.asarray(draft))


def test_other_files_go_to_pillow_whatever_their_name() -> None:
    cmyk = encoded(picture(40, 30).convert("CMYK"), "JPEG")
    for data in (cmyk, encoded(picture(40, 30), "PNG"), encoded(picture(40, 30), "WEBP")):
        assert _plain_jpeg(data) is None
        assert np.array_equal(open_picture(data).pixels(2), np.asarray(decode(data)))


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    forged = bytearray(encoded(picture(16, 16), "JPEG", progressive=True))
    frame = forged.index(b"\xff\xc2")
    forged[frame + 5 : frame + 9] = struct.pack(">HH", MAX_PIXELS // 4096, 4096)
    data = bytes(forged)
    assert open_picture(data).width == 4096  # ten scans of as many pixels are fine
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * 9 + data[-2:]
    for read in (decode, open_picture):
        with pytest.raises(BadImage, match="scans"):
            read(bomb)


def test_a_jpeg_that_claims_too_many_pixels_is_refused_from_its_header() -> None:
    data = bytearray(encoded(picture(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(BadImage, match="65000 x 65000 pixels"):
        open_picture(bytes(data))


def pixels_or_reason(data: bytes) -> tuple[bytes | None, str]:
    try:
        return open_picture(data).pixels().tobytes(), ""
    except BadImage as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore:Image size", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 3}])
def test_damaged_jpegs_have_the_verdict_and_the_pixels_that_pillow_gives_them(options: dict[str, Any]) -> None:
    whole = encoded(picture(40, 30), "JPEG", **options)
    rng, bad = random.Random(1), 0
    for trial in range(600):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        if trial % 5 == 0:
            del data[rng.randrange(2, len(data)) :]
        found, _ = pixels_or_reason(bytes(data))
        try:
            expected = np.asarray(decode(bytes(data))).tobytes()
        except BadImage:
            expected, bad = None, bad + 1
        assert found == expected
    assert bad > 50
