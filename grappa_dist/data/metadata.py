"""Files of images without metadata: text, profiles and thumbnails, which decide no pixel, but may be damaged or huge.

Pillow reads metadata before pixels, and refuses a file for them, or takes time that grows with their square.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

PNG, JPEG, GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF8"
MUCH = 2**20  # bytes of metadata that are dropped before Pillow sees them
_SMALL = 2**16  # bytes of a kept chunk of metadata: orientation takes some dozen
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_KIND = re.compile(rb"[A-Za-z]{4}")
_LATER = re.compile(rb"PLTE|IDAT|IEND")
_TRIES = 64  # places at which a PNG is looked into again behind a damage
_TURNS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")  # segments of a JPEG that may say how it is turned
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_COLOURS = {0xE0: 18, 0xEE: 16}  # segments of a JPEG that decide colours: JFIF and Adobe, with their least bytes
_EXIF_XMP_ICC = 0x08 | 0x04 | 0x20  # flags of VP8X


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def without_much_metadata(data: bytes) -> bytes:
    """The file, without its metadata but for orientation where they are so many that reading them takes long."""
    if data[:4] == GIF and _gif_image_at(data) > MUCH:
        return _bare_gif(data) or data
    if data[:2] == JPEG and len(data) > MUCH and max((end for _, end, _ in _segments(data)), default=0) > MUCH:
        return _bare_jpeg(data, turned=True)
    if data[:8] == PNG and len(data) > MUCH and sum(_other_bytes(data)) > MUCH:
        return _bare_png(data)
    return data


def _other_bytes(data: bytes) -> Iterator[int]:
    """Bytes of each chunk of a PNG that decides no pixel."""
    at = len(PNG)
    while at < len(data):
        length = 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in _PIXELS:
            yield length
        at += length


def without_metadata(data: bytes) -> bytes | None:
    """The file of the same pixels without metadata; None where there are none, or it is no such file.

    Orientation is kept in a PNG where its chunk is whole; a JPEG or a WebP loses it.
    """
    bare = None
    if data[:8] == PNG:
        bare = _bare_png(data)
    elif data[:2] == JPEG:
        bare = _bare_jpeg(data, turned=False)
    elif is_webp(data):
        bare = _bare_webp(data)
    elif data[:4] == GIF:
        bare = _bare_gif(data)
    return None if bare is None or len(bare) >= len(data) else bare


def _bare_png(data: bytes) -> bytes:
    """The chunks that decide pixels, and those of orientation and transparency where they are whole."""
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind not in _PIXELS and not _is_followed(data, end):  # its length is damaged as well
            at = _later_chunk(data, at)
            continue
        if kind in _PIXELS or (_may_stay(data, at, end) and _is_whole(data, at, end)):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _may_stay(data: bytes, at: int, end: int) -> bool:
    kind = data[at + 4 : at + 8]
    xmp = kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0\0", at + 8)
    return end - at <= _SMALL and (xmp or kind in (b"eXIf", b"tRNS"))


def _is_whole(data: bytes, at: int, end: int) -> bool:
    return zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _is_followed(data: bytes, end: int) -> bool:
    """Whether a chunk may end there: it is the end of the file, or another one may begin."""
    return end == len(data) or _KIND.fullmatch(data, end + 4, end + 8) is not None


def _later_chunk(data: bytes, at: int) -> int:
    """Where the next whole chunk of pixels behind a damage begins; the end of the file where none is found."""
    for tries, found in enumerate(_LATER.finditer(data, at + 8)):
        start = found.start() - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if tries == _TRIES:
            break
        if end <= len(data) and _is_whole(data, start, end):
            return start
    return len(data)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, marker) of each segment of a JPEG before the first scan; fewer where their chain breaks."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # bytes that fill up
            at = len(data) - len(data[at:].lstrip(b"\xff")) - 1
            continue
        if data[at + 1] == 0xDA:
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield at, end, data[at + 1]
        at = end


def _bare_jpeg(data: bytes, *, turned: bool) -> bytes:
    """Without the segments of applications, but for JFIF and Adobe, which decide colours; and without comments.

    Args:
        turned: whether the first segments that may say how the image is turned are kept.
    """
    kept, at, seen = [JPEG], 2, set[bytes]()
    for start, end, marker in _segments(data):
        turns = [sign for sign in _TURNS if data.startswith(sign, start + 4) and sign not in seen]
        is_metadata = marker == 0xFE or 0xE0 <= marker <= 0xEF
        is_metadata &= end - start < _COLOURS.get(marker, end)
        if not is_metadata or (turned and turns):
            kept.append(data[start:end])
            seen.update(turns)
        at = end
    return b"".join([*kept, data[at:]])


def _bare_webp(data: bytes) -> bytes:
    kept, at = list[bytes](), 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        if kind == b"VP8X":
            kept.append(data[at : at + 8] + bytes([data[at + 8] & ~_EXIF_XMP_ICC]) + data[at + 9 : end])
        elif kind in _WEBP_PIXELS:
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, label) of each extension of a GIF before its first image; the last has the label -1, an image."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 2 < len(data) and data[at] == 0x21:
        end = at + 2
        while end < len(data) and data[end]:
            end += data[end] + 1
        yield at, end + 1, data[at + 1]
        at = end + 1
    yield at, at, -1


def _gif_image_at(data: bytes) -> int:
    return max(end for _, end, _ in _gif_blocks(data))


def _bare_gif(data: bytes) -> bytes:
    """Without comments and application blocks before the first image."""
    blocks = list(_gif_blocks(data))
    kept = [data[start:end] for start, end, label in blocks if label == 0xF9]
    return b"".join([data[: blocks[0][0]], *kept, data[blocks[-1][0] :]])
