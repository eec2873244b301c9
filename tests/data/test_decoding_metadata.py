"""Pixels decide: whole ones make a good image whatever lies beside them, in bounded time and memory."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from grappa_dist.data.decoding import BadImage, decode, open_picture
from grappa_dist.data.metadata import without_metadata
from tests.data.test_decoding import encoded, picture
from tests.mutations import mutations

IMAGE = picture(40, 30)
PNG, JPEG, WEBP, GIF = (encoded(IMAGE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
MIB = 2**20


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png_with(*chunks: bytes) -> bytes:
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def webp_with(kind: bytes, data: bytes, flags: int) -> bytes:
    whole = encoded(IMAGE, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    assert whole[12:16] == b"VP8X"
    body = bytearray(whole[8 : whole.index(b"EXIF")] + kind + struct.pack("<I", len(data)) + data)
    body[12] = flags
    return b"RIFF" + struct.pack("<I", len(body)) + bytes(body)


BOMB = zlib.compress(bytes(64 * MIB), 9)
PNGS = {
    "zTXt of 2 MiB": png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2 * MIB))),
    "zTXt bomb": png_with(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "iTXt bomb": png_with(chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    "iCCP bomb": png_with(chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "many bombs": png_with(*[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MIB - 9)))] * 80),
    "tEXt of 70 MiB": png_with(chunk(b"tEXt", b"Comment\0" + b"x" * 70 * MIB)),
    "zTXt that is none": png_with(chunk(b"zTXt", b"Comment\0\0not zlib")),
    "zTXt of an unknown kind": png_with(chunk(b"zTXt", b"Comment\0\7" + zlib.compress(b"x"))),
    "iCCP that is none": png_with(chunk(b"iCCP", b"icc\0\0not zlib")),
    "iCCP of an unknown kind": png_with(chunk(b"iCCP", b"icc\0\7x")),
    "eXIf that is none": png_with(chunk(b"eXIf", b"garbage")),
    "eXIf of a wrong length": png_with(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "a wrong checksum of text": png_with(chunk(b"tEXt", b"Comment\0x", crc=7)),
    "a wrong checksum of a date": png_with(chunk(b"tIME", b"\7\xea\1\1\0\0\0", crc=7)),
    "a date of no length": png_with(chunk(b"tIME", b"")),
    "dots of no length": png_with(chunk(b"pHYs", b"\1")),
    "colours of no length": png_with(chunk(b"cHRM", b"\1"), chunk(b"gAMA", b""), chunk(b"sRGB", b"")),
    "an animation that is none": png_with(chunk(b"acTL", b"\0\0\0\0\0\0\0\0"), chunk(b"fcTL", b"")),
    "a length beyond the end": png_with(struct.pack(">I", 2**31 - 1) + b"tEXtComment\0x" + bytes(4)),
    "a length that is too short": png_with(struct.pack(">I", 3) + b"tEXtComment\0xyz" + bytes(4)),
    "a hundred thousand empty chunks": png_with(chunk(b"teSt", b"") * 10**5),
    "an unknown chunk": png_with(chunk(b"prVt", b"x" * 100, crc=1)),
}
JPEGS = {
    "EXIF that is none": jpeg_with(segment(0xE1, b"Exif\0\0garbage")),
    "EXIF that points beyond": jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "EXIF that points to itself": jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\0")),
    "XMP that is none": jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta")),
    "a profile in one part of many": jpeg_with(segment(0xE2, b"ICC_PROFILE\0\2\7garbage")),
    "a profile of no part": jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
    "pictures of a MPO that are none": jpeg_with(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
    "Photoshop that is none": jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x10xx")),
    "5 MiB that fill up": JPEG[:2] + b"\xff" * 5 * MIB + JPEG[2:],
    "JFIF of no length": jpeg_with(segment(0xE0, b"JFIF\0")),
    "Adobe of no length": jpeg_with(segment(0xEE, b"Adob")),
    "40 MiB of EXIF": jpeg_with(*[segment(0xE1, b"Exif\0\0" + b"x" * 65000)] * 640),
    "40 MiB of a profile": jpeg_with(*[segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 65000)] * 640),
    "40 MiB of comments": jpeg_with(*[segment(0xFE, b"x" * 65000)] * 640),
}
WEBPS = {
    "EXIF that is none": webp_with(b"EXIF", b"garbage", 8),
    "XMP that is none": webp_with(b"XMP ", b"<x", 4),
    "a profile that is none": webp_with(b"ICCP", b"x", 32),
    "EXIF of 20 MiB": webp_with(b"EXIF", bytes(20 * MIB), 8),
}


def comment(blocks: int) -> bytes:
    return b"\x21\xfe" + (b"\xff" + b"x" * 255) * blocks + b"\0"


def gif_with(extension: bytes) -> bytes:
    at = 13 + (3 << (GIF[10] & 7) + 1 if GIF[10] & 0x80 else 0)
    return GIF[:at] + extension + GIF[at:]


GIFS = {
    "a comment of 40 MiB": gif_with(comment(160_000)),
    "comments without end": gif_with(comment(1) * 50_000),
    "a block of no application": gif_with(b"\x21\xff\x02xx\0"),
}
CASES = [(PNG, data, f"PNG, {name}") for name, data in PNGS.items()]
CASES += [(JPEG, data, f"JPEG, {name}") for name, data in JPEGS.items()]
CASES += [(WEBP, data, f"WebP, {name}") for name, data in WEBPS.items()]
CASES += [(GIF, data, f"GIF, {name}") for name, data in GIFS.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("plain", "data"), [case[:2] for case in CASES], ids=[case[2] for case in CASES])
def test_metadata_change_no_pixel_and_refuse_no_image(plain: bytes, data: bytes) -> None:
    start = time.thread_time()
    pixels = open_picture(data).pixels()
    assert time.thread_time() - start < 5  # of this thread alone; what is quadratic takes minutes
    assert np.array_equal(pixels, open_picture(plain).pixels())
    assert np.array_equal(np.asarray(decode(data)), pixels)


def test_orientation_survives_where_its_chunk_is_whole() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 2 * MIB, zip=True)
    turned = np.asarray(decode(encoded(IMAGE, "PNG", exif=exif)))
    assert np.array_equal(np.asarray(decode(encoded(IMAGE, "PNG", exif=exif, pnginfo=info))), turned)
    many = encoded(IMAGE, "JPEG", exif=exif)
    assert turned.shape == (40, 30, 3)
    assert open_picture(many).pixels().shape == (40, 30, 3)
    at = 4 + struct.unpack(">H", many[4:6])[0]
    huge = many[:at] + segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 65000) * 40 + many[at:]
    assert open_picture(huge).pixels().shape == (40, 30, 3)


def test_transparency_survives() -> None:
    data = encoded(Image.new("RGB", (3, 2)), "PNG", transparency=(0, 0, 0))
    bad = data[:33] + chunk(b"zTXt", b"Comment\0\0not zlib") + data[33:]
    assert np.asarray(decode(bad)).min() == 255


def test_damaged_pixels_stay_bad_whatever_metadata_are_beside() -> None:
    for data in (png_with(chunk(b"tEXt", b"x", crc=1)), jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"))):
        with pytest.raises(BadImage):
            decode(data[: len(data) // 2])
    flipped = bytearray(PNGS["zTXt that is none"])
    flipped[-60] ^= 255
    with pytest.raises(BadImage):
        decode(bytes(flipped))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: PNGS["a wrong checksum of text"], lambda: JPEGS["EXIF that points beyond"]])
def test_any_damage_of_metadata_is_read_or_named(make: Callable[[], bytes]) -> None:
    whole, rng = make(), random.Random(0)
    for _ in range(mutations(200)):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        without_metadata(bytes(data))
        try:
            assert decode(bytes(data)).mode == "RGB"
        except BadImage as why:
            assert "object at" not in str(why)  # noqa: PT017


def test_a_canvas_run_lengths_and_tags_out_of_proportion_are_refused_from_the_header() -> None:
    canvas = bytearray(webp_with(b"EXIF", b"x", 8))
    canvas[24:30] = b"\xff\xff\0\xff\xff\0"
    with pytest.raises(BadImage, match="65536 x 65536 pixels"):
        decode(bytes(canvas))
    runs = (
        b"BM"
        + struct.pack("<IHHI", 1100, 0, 0, 1078)
        + struct.pack("<IiiHHIIiiII", 40, 2**26, 1, 1, 8, 1, 0, 0, 0, 0, 0)
    )
    with pytest.raises(BadImage, match="67108864 pixels wide"):
        decode(runs + bytes(1024) + b"\0\2\xff\xff" * 10)
    entries = b"".join(struct.pack("<HHII", 50_000 + tag, 1, 2**24, 8) for tag in range(500))
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 500) + entries + bytes(2**24)
    with pytest.raises(BadImage, match=r"tags of \d+ bytes in a TIFF"):
        decode(tiff, ("TIFF",))


def test_of_thousands_of_frames_the_first_alone_is_decoded() -> None:
    frames = [Image.new("P", (8, 8), number % 200) for number in range(3000)]
    for kind in ("GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        start = time.thread_time()
        assert open_picture(data).pixels().shape == (8, 8, 3)
        assert time.thread_time() - start < 2


def test_one_pixel_of_much_metadata_is_no_bomb() -> None:
    with pytest.raises(BadImage):
        decode(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"a\0\0" + BOMB)).getvalue())
