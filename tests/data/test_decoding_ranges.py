"""Numbers of more than 8 bits, whose range a file seldom gives: pictures that can be told apart, or bad by name."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.data.decoding import BadImage, Picture, decode
from tests.data.test_decoding import encoded, picture

GREY = np.asarray(picture(40, 30).convert("L")).astype(np.int64)  # about 0 to 255
BITS = {bits: GREY * (2**bits - 1) // 255 for bits in (8, 10, 12, 14, 16, 20, 31)}


def tiff(values: NDArray[Any], bits: int, sign: int, order: str = "<") -> bytes:
    """A grey TIFF of one strip. `sign`: 1 unsigned, 2 signed, 3 float; 0: not said."""
    kind = {1: "u", 2: "i", 3: "f", 0: "u"}[sign]
    body = values.astype(f"{order}{kind}{bits // 8}").tobytes()
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(body)), *([(339, 3, sign)] if sign else [])]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, type, 1)
        + (struct.pack(f"{order}HH", value, 0) if type == 3 else struct.pack(f"{order}I", value))
        for tag, type, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def grey_of(data: bytes) -> NDArray[np.int64]:
    return np.asarray(decode(data, ("TIFF", "PNG")))[..., 0].astype(np.int64)


def check_told_apart(data: bytes) -> None:
    """The picture is GREY but for a factor from 1/2 to 1 and an offset."""
    found = grey_of(data)
    assert found.max() >= 64
    assert np.corrcoef(found.ravel(), GREY.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_of_any_bits_in_16_can_be_told_apart(bits: int, order: str) -> None:
    check_told_apart(tiff(BITS[bits], 16, 1, order))
    check_told_apart(tiff(BITS[bits], 16, 0, order))
    check_told_apart(encoded(Image.fromarray(BITS[bits].astype(np.uint16)), "PNG"))
    if bits < 16:
        check_told_apart(tiff(BITS[bits], 16, 2, order))


@pytest.mark.parametrize("bits", [8, 12, 16, 20, 31])
@pytest.mark.parametrize("sign", [0, 1, 2])
def test_grey_of_any_bits_in_32_can_be_told_apart(bits: int, sign: int) -> None:
    check_told_apart(tiff(BITS[bits], 32, sign))
    if sign == 2:
        check_told_apart(tiff(BITS[bits], 32, sign, ">"))
    else:  # a kind that Pillow does not know
        with pytest.raises(BadImage, match=r"no TIFF or PNG that can be read; it begins with 4d 4d"):
            decode(tiff(BITS[bits], 32, sign, ">"), ("TIFF", "PNG"))


def test_numbers_below_zero_and_above_2_to_31_can_be_told_apart() -> None:
    check_told_apart(tiff(GREY - 128, 16, 2))
    check_told_apart(tiff(GREY * 16 - 1024, 16, 2))
    check_told_apart(tiff(GREY * 2**20 - 2**27, 32, 2))
    check_told_apart(tiff(GREY * 2**24, 32, 1))


def test_what_fills_16_bits_keeps_the_pixels_that_it_had() -> None:
    for top in (2**14, 2**15, 2**16 - 1):
        values = GREY * top // int(GREY.max())
        assert np.array_equal(grey_of(tiff(values, 16, 1)), values >> 8)
        assert np.array_equal(grey_of(encoded(Image.fromarray(values.astype(np.uint16)), "PNG")), values >> 8)
    assert grey_of(tiff(GREY * 0, 16, 1)).max() == 0


def test_floats_are_bad_by_name_whoever_gives_them() -> None:
    with pytest.raises(BadImage, match="floating-point pixels"):
        decode(tiff(GREY / 255, 32, 3), ("TIFF",))
    with pytest.raises(BadImage, match="floating-point pixels"):
        Picture.of(Image.fromarray((GREY / 255).astype(np.float32)))


def png_of_16_bits(values: NDArray[Any], colours: int) -> bytes:
    """Of (H, W, C) numbers; colours: 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colours", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_12_bits_in_16_are_bad_by_name_and_those_of_16_are_not(colours: int, bands: int) -> None:
    values = np.repeat(BITS[16][..., None], bands, 2)
    if colours in (4, 6):
        values[..., -1] = 65535
    found = np.asarray(decode(png_of_16_bits(values, colours)))
    assert np.abs(found[..., 0].astype(int) - (BITS[16] >> 8)).max() <= 1
    values[..., : 3 if colours != 4 else 1] //= 16
    with pytest.raises(BadImage, match="16 bits a colour, none of which is above 16 of 256 levels"):
        decode(png_of_16_bits(values, colours))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"])
def test_other_modes_are_pictures(mode: str) -> None:
    image = picture(40, 30).convert("P" if mode == "PA" else "RGB").convert(mode)
    pixels = [Picture.of(image).pixels()]
    if mode != "PA":  # no format has it
        how = {"compression": "tiff_deflate"} if mode == "YCbCr" else {}  # else Pillow 11.3 reads not what it writes
        pixels.append(np.asarray(decode(encoded(image, "TIFF", **how), ("TIFF",))))
    for found in pixels:
        grey = np.asarray(Image.fromarray(found).convert("L")).astype(float)
        assert np.corrcoef(grey.ravel(), GREY.ravel())[0, 1] > (0.3 if mode == "1" else 0.95)
