"""From the bytes of a file to upright RGB pixels. Shapes: H, W of an image.

Plain JPEG files go to the fast decoder; all others, and all that it refuses, go to Pillow, which decides. For JPEG both
are libjpeg-turbo and give the same pixels at full scale, to the bit (tests/data/test_decoding.py).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from grappa_dist.data.metadata import PNG, is_webp, without_metadata, without_much_metadata

COPIED = {"jpg": "jpg", "jpeg": "jpeg", "png": "png", "webp": "webp", "jfif": "jpg", "jpe": "jpg"}  # -> in a shard
REWRITTEN = ("bmp", "gif", "tif", "tiff")  # become PNG: readers of shards expect the four suffixes above
REENCODED = ("heic", "heif", "avif")  # become JPEG, as they are compressed with losses too
TAKEN = (*COPIED, *REWRITTEN, *REENCODED)  # by make_shards

Pixels = NDArray[np.uint8]
MAX_PIXELS = 64 * 2**20  # more is taken for a decompression bomb
MAX_SCANNED = 16 * MAX_PIXELS  # pixels times scans of a JPEG: a scan goes over all pixels, and may cost few bytes
MORE_FORMATS = {**dict.fromkeys(REWRITTEN, ("TIFF",)), **dict.fromkeys(REENCODED, ("HEIF", "AVIF"))}  # by suffix
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # by content; files of the web often carry another format's suffix
# What Pillow's parsers raise on damaged files. Not MemoryError: the machine may be at fault, and the row good.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")  # of HEIF
_ORIENTATION = 0x0112  # EXIF
_TIFF_BITS, _TIFF_SAMPLES = 258, 339  # tags
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of a tag's values
_DARK = 16  # of 256 levels: 12 bits read as 16
_WIDEST_RUNS = 2**18
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
_TURN: dict[Image.Transpose, Callable[[Pixels], Pixels]] = {  # views, nothing is copied
    Image.Transpose.FLIP_LEFT_RIGHT: lambda x: x[:, ::-1],
    Image.Transpose.ROTATE_180: lambda x: x[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda x: x[::-1],
    Image.Transpose.TRANSPOSE: lambda x: x.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda x: x.swapaxes(0, 1)[:, ::-1],
    Image.Transpose.TRANSVERSE: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    Image.Transpose.ROTATE_90: lambda x: x.swapaxes(0, 1)[::-1],
}
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_SOF, _PROGRESSIVE, _SOS, _APP1 = (0xC0, 0xC1, 0xC2), 0xC2, 0xDA, 0xE1  # JPEG markers


def suffix_of(data: bytes) -> str:
    """The suffix, one of TAKEN, of a file by its first bytes; jpg where they are of none of these formats."""
    if is_webp(data):
        return "webp"
    if data[4:8] == b"ftyp" and (brand := data[8:12]) in _BRANDS:
        return "avif" if brand in (b"avif", b"avis") else "heic"
    begins = ((PNG, "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"))
    return next((suffix for begin, suffix in begins if data.startswith(begin)), "jpg")


@cache
def describe_missing_decoder(suffix: str) -> str:
    """What files of a suffix need and is not installed, with its install line; "" where nothing is missing."""
    if suffix == "avif":
        return "" if features.check("avif") else "AVIF, which this Pillow does not decode: pip install 'pillow>=11.3'"
    if suffix in REENCODED:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return "HEIC, which needs pillow-heif: pip install 'grappa-dist[heif]'"
        register_heif_opener(thumbnails=False)
    return ""


class BadImage(ValueError):
    """The bytes are no image that we read; the message says why."""


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels are decoded when asked for."""

    width: int  # upright
    height: int
    _read: Callable[[int], Pixels]

    def pixels(self, shrink: int = 1) -> Pixels:
        """Upright RGB pixels, (H, W, 3); with `shrink` 2, 4 or 8 perhaps fewer, by no larger a factor.

        Raises:
            BadImage: the file does not decode.
        """
        return self._read(shrink)

    @staticmethod
    def of(image: Image.Image) -> Picture:
        """The picture of an image in memory."""
        pixels = np.array(to_rgb(image))
        return Picture(image.width, image.height, lambda shrink: pixels)


def open_picture(data: bytes) -> Picture:
    """The image in a file, of an animation the first frame; a plain JPEG file is not decoded yet.

    Raises:
        BadImage: for bytes that give none.
    """
    header = _plain_jpeg(data)
    if header is None:
        return Picture.of(decode(data))
    width, height, scans, turned = header
    _refuse_bomb(width, height, scans)
    turn = _turn_of(data) if turned else None

    def read(shrink: int) -> Pixels:
        least = {} if shrink == 1 else {"min_width": -(-width // shrink), "min_height": -(-height // shrink)}
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data, min_factor=shrink, **least)
        except ValueError:  # damaged, perhaps in a way that Pillow can still read
            return np.array(decode(data))
        return pixels if turn is None else _TURN[turn](pixels)

    return Picture(height, width, read) if turn in _LYING else Picture(width, height, read)


def size_of(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height as they lie in a file, by its header: no pixel is decoded.

    Args:
        formats: as of `decode`.

    Raises:
        BadImage: the header is of no such format, or damaged.
    """
    if (plain := _plain_jpeg(data)) is not None:
        return plain[:2]
    _refuse_header(data)
    with _refusing(data, formats):
        return _opened(without_much_metadata(data), formats).size


def decode(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The RGB image in a file, upright, by Pillow; of an animation the first frame.

    Args:
        formats: that are tried, by Pillow's names.

    Raises:
        BadImage: for any bytes that do not give one.
    """
    if not data:
        raise BadImage("empty file")
    _refuse_header(data)
    data = without_much_metadata(data)
    try:
        return _decoded(data, formats)
    except BadImage:
        bare = without_metadata(data)
        if bare is None:
            raise
        try:  # pixels decide
            return _decoded(bare, formats)
        except BadImage:
            pass
        raise


def _decoded(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    with _refusing(data, formats):
        image = _opened(data, formats)
        _refuse_bomb(*image.size, scans=data.count(_SCAN) if data[:2] == _JPEG else 1)
        image.load()
        turn = _transpose_of(image)
        rgb = to_rgb(_told_apart(image, deep=_is_deep(image, data)))
        return rgb if turn is None else rgb.transpose(turn)


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Pillow's image, not decoded. Formats that no plugin reads here, such as HEIF, are left out: Pillow would fail."""
    if not all(name in Image.OPEN for name in formats):
        Image.init()  # registers those that come with Pillow
    return Image.open(BytesIO(data), formats=[name for name in formats if name in Image.OPEN])


@contextmanager
def _refusing(data: bytes, formats: tuple[str, ...]) -> Iterator[None]:
    """While inside, what Pillow raises on a file that it cannot read is a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        kinds = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise BadImage(f"no {kinds} that can be read; it begins with {_shown(data[:12])}") from None
    except _UNREADABLE as error:
        raise BadImage(_reason(error)) from None


def _shown(data: bytes) -> str:
    """Some bytes as text where they are one, else in hexadecimal."""
    return f"'{data.decode()}'" if data.isascii() and data.decode().isprintable() else data.hex(" ")


def _reason(error: BaseException) -> str:
    text = re.sub(r"<[^<>]*\b(object|class)\b[^<>]*>", "the file", str(error))  # as Python shows what has no name
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return f"{type(error).__name__}: {' '.join(text.split())[:300] or 'no message'}"


def _told_apart(image: Image.Image, *, deep: bool) -> Image.Image:
    """An image whose numbers have a known range, or are put into one.

    Args:
        deep: whether a sample has 16 bits.

    Raises:
        BadImage: there is nothing to tell its range by, and it would be black.
    """
    if image.mode == "I" and getattr(image, "tag_v2", {}).get(_TIFF_SAMPLES, (1,))[0] == 1:  # unsigned
        return Image.fromarray(_as_bytes(np.asarray(image).view(np.uint32)))
    if deep and not image.mode.startswith("I"):  # of colours Pillow gives the upper 8 bits alone
        colours = [band for band in image.getbands() if band not in "Aa"]
        if max(int(np.asarray(image.getchannel(band)).max()) for band in colours) < _DARK:
            raise BadImage(
                f"16 bits a colour, none of which is above {_DARK} of 256 levels: of fewer bits, as it seems"
            )
    return image


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether the file, a PNG or TIFF, has 16 bits a sample."""
    tags = getattr(image, "tag_v2", None)
    return 16 in tags.get(_TIFF_BITS, ()) if tags else data[:8] == PNG and data[24] == 16


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole numbers in 8 bits: 16 bits lose 8; of another range, which no file gives, the brightest is above 127.

    Numbers below a quarter of 16 bits would be near black; 8, 10, 12 and 14 bits are often kept in 16 or 32.
    """
    low, high = min(0, int(values.min(initial=0))), int(values.max(initial=0))
    span = high - low
    shift = 8 if 2**14 <= span < 2**16 else max(0, span.bit_length() - 8)
    if low or span > 2**31:
        values = values.astype(np.int64) - low
    return (values >> shift).clip(0, 255).astype(np.uint8)


def _refuse_header(data: bytes) -> None:
    """Refuses what takes memory beyond its pixels before Pillow knows their number.

    Raises:
        BadImage: for the canvas of a WebP, steps in a BMP and tags of a TIFF that are out of all proportion.
    """
    if is_webp(data) and data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        _refuse_bomb(width, height, scans=1)
    if data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        width = int.from_bytes(data[18:22], "little", signed=True)
        if width > _WIDEST_RUNS:  # a step of two bytes skips up to 255 rows
            raise BadImage(f"a BMP of run lengths {width} pixels wide; {_WIDEST_RUNS} are decoded at most")
    if data[:4] in (b"II*\0", b"MM\0*") and (size := _tags_size(data)) > len(data):
        raise BadImage(f"tags of {size} bytes in a TIFF of {len(data)}")


def _tags_size(data: bytes) -> int:
    """Bytes that the tags of the first page of a TIFF say they have."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, at)
        entries = struct.iter_unpack(f"{order}HHI4x", data[at + 2 : at + 2 + 12 * count])
        return sum(_TYPE_BYTES.get(kind, 1) * number for _, kind, number in entries)
    except struct.error:  # damaged, which Pillow will say
        return 0


def _refuse_bomb(width: int, height: int, scans: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; from 1 to {MAX_PIXELS} are decoded")
    if width * height * scans > MAX_SCANNED:
        raise BadImage(f"{scans} scans of {width} x {height} pixels; {MAX_SCANNED} in all are decoded at most")


def _plain_jpeg(data: bytes) -> tuple[int, int, int, bool] | None:
    """Width and height as they lie in the file, scans, and whether metadata may turn it; None: a file for Pillow.

    Plain are grey and three-channel files of 8 bits by Huffman coding, baseline or progressive.
    """
    if data[:2] != _JPEG:
        return None
    at, turned, frame = 2, False, None
    while at + 4 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            if frame is None:
                return None
            kind, width, height, channels = frame
            one_scan = kind != _PROGRESSIVE and data[at + 4] == channels  # counting costs a tenth of the decoding
            return width, height, 1 if one_scan else data.count(_SCAN), turned
        if marker in _SOF and at + 10 <= len(data):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8 or channels not in (1, 3):
                return None
            frame = (marker, width, height, channels)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # another way of coding
            return None
        turned = turned or marker == _APP1
        at += 2 + length
    return None


def _turn_of(data: bytes) -> Image.Transpose | None:
    """The turn that the EXIF data of a JPEG (or the same in XMP) ask for; Pillow reads the header alone."""
    try:
        return _transpose_of(Image.open(BytesIO(without_much_metadata(data)), formats=("JPEG",)))
    except _UNREADABLE:  # as broken EXIF: the pixels decide
        return None


def _transpose_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except _UNREADABLE:  # broken EXIF leaves the pixels as good as they are
        return None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say."""
    method = _transpose_of(image)
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: whole numbers of more bits scaled to 8, what is transparent on white.

    Raises:
        BadImage: its pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range the file does not give")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # grey of 16 or 32 bits, which a plain conversion would clip at 255
        return Image.fromarray(_as_bytes(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
