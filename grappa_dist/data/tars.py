"""Headers of plain tars, read without trust: whatever the bytes are, time is linear in them and memory is bounded.

`tarfile` parses the 512 bytes of a header. The walk from one to the next is ours: that of tarfile accepts sizes below
zero and loops on them, reads extended headers of any size, with expressions of quadratic time and by recursion, and
keeps every header in memory.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tarfile import TarInfo
from typing import IO, NamedTuple

_BLOCK = 512
_EXTENDED = 2**20  # bytes of an extended header at most: it holds a name and some attributes
_RECORD = 10_240  # bytes, to whose multiple a tar is filled up with zeros, where its writer was not told otherwise
_RECORDS = [2**power for power in range(12, 21)]  # others that are usual: 4 KiB to 1 MiB
_END_MARK = 1024  # two blocks of zeros
_PIECE = 2**18  # bytes of zeros that are looked through at a time
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_SPARSE = "GNU.sparse."  # what begins the keys of pax records of a sparse file
_KEYS = ("path", "size", _SPARSE, f"{_SPARSE}name")  # of pax records that are kept
_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$", re.DOTALL)  # WebDataset's grouping: the first dot of the base name


class DamagedTar(ValueError):
    """A file that is no plain tar, or is none from some byte on.

    Attributes:
        offset: where what cannot be read begins, at most the size of the file.
        cut: whether the file ends inside a member, so that how much is missing is unknown.
        zeros: where zeros are the damage.
    """

    def __init__(
        self, path: Path | str, offset: int, reason: str, *, cut: bool = False, zeros: Zeros | None = None
    ) -> None:
        super().__init__(f"{path}: not a plain tar, or cut off or damaged, at byte {offset}: {reason}")
        self.offset, self.cut, self.zeros = offset, cut, zeros


class Zeros(NamedTuple):
    """A stretch of zeros where a header or the end of a tar should be."""

    start: int
    end: int
    torn: bool  # the last block of the member before is zeros as well, so a part of it may be missing
    padding: bool  # no more than the end mark of a tar that another one follows; else members may be missing


OnZeros = Callable[[Zeros], object] | None
_NO_ZEROS = Zeros(-1, -1, torn=False, padding=True)


class _Damage(Exception):
    """What is wrong with a header, or with what follows it."""

    def __init__(self, reason: str, *, cut: bool = False) -> None:
        super().__init__(reason)
        self.cut = cut


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case suffix) of a member, or None where the name has none."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def members_of(
    file: IO[bytes], path: Path | str, size: int | None = None, start: int = 0, on_zeros: OnZeros = None
) -> Iterator[TarInfo]:
    """Headers of a plain tar, from the one at `start` to the end; the data of the last may be cut off.

    A tar may be several, one behind the other: what follows the end mark of one is read as well. Sparse files have a
    `sparse` that is not None; their maps are not read.

    Args:
        size: of the file; None: it is a local one and is asked.
        on_zeros: called for each stretch of zeros that members follow; None: one that is no padding is a damage.

    Raises:
        DamagedTar: it is another kind of file, or cut off or damaged, or ends in more zeros than fill up a tar.
    """
    end = os.fstat(file.fileno()).st_size if size is None else size
    at, begin, zeros = start, start, _NO_ZEROS  # begin: of the tar in the file that is being read
    while True:
        try:
            found = _next_member(file, at, end)
        except _Damage as error:
            raise _damaged(path, at, error, zeros) from None
        if found is None:
            zeros = _zeros_at(file, at, end, begin)
            if not zeros.padding and (zeros.end == end or on_zeros is None):
                raise DamagedTar(path, at, f"{zeros.end - at} bytes of zeros, more than fill up a tar", zeros=zeros)
            if zeros.end == end:
                return
            at, begin = zeros.end, zeros.end if zeros.padding else begin
            continue
        if zeros.end == at and on_zeros is not None:
            on_zeros(zeros)
        member, after = found
        yield member
        if after > end:
            raise DamagedTar(path, end, f"a member reaches to byte {after}", cut=True)
        at = after


def _damaged(path: Path | str, at: int, why: _Damage, zeros: Zeros) -> DamagedTar:
    """The error for a damage at a byte; where zeros end there, it began with them."""
    if zeros.end != at:
        return DamagedTar(path, at, str(why), cut=why.cut)
    reason = f"{zeros.end - zeros.start} bytes of zeros, and what follows is no header: {why}"
    return DamagedTar(path, zeros.start, reason, zeros=zeros)


def _zeros_at(file: IO[bytes], at: int, end: int, begin: int) -> Zeros:
    """The zeros that begin at a block, to the end or to a block that is no zeros, in a tar that begins at `begin`."""
    torn = at >= begin + _BLOCK and not any(_read(file, at - _BLOCK, _BLOCK, end))
    until = at
    while until < end:
        piece = _read(file, until, min(_PIECE, end - until), end)
        if other := piece.lstrip(b"\0"):
            until += (len(piece) - len(other)) // _BLOCK * _BLOCK
            break
        until += len(piece)
    records = [_RECORD, *(size for size in _RECORDS if until == end or size > _RECORD)]
    filled = max((size for size in records if 0 in ((until - begin) % size, until % size)), default=0)
    return Zeros(at, until, torn, padding=until - at < _END_MARK + max(filled, 1))


def _next_member(file: IO[bytes], at: int, end: int) -> tuple[TarInfo, int] | None:
    """The member whose headers begin at `at`, and where the next ones do; None at the end mark.

    Global headers, which hold comments, are passed over: one name for all files would be none.
    """
    own: dict[str, str] = {}
    first = at
    while True:
        header, block = _header(file, at, end)
        if header is None:
            if at > first:
                raise _Damage("the tar ends after an extended header")
            return None
        at += _BLOCK
        if header.type not in (*_PAX, *_LONG, tarfile.XGLTYPE):
            return _with_records(file, header, block, at, end, own)
        if header.size > _EXTENDED:
            raise _Damage(f"an extended header of {header.size} bytes; {_EXTENDED} are read at most")
        data = _read(file, at, header.size, end)
        at += _blocks(header.size)
        if header.type in _PAX:
            own = _records(data) | own  # of two for the same key, the first one counts
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            own.setdefault("path", _text(data.partition(b"\0")[0]))


def _header(file: IO[bytes], at: int, end: int) -> tuple[TarInfo | None, bytes]:
    """One header with its bytes; None for a block of zeros."""
    if at == end:
        raise _Damage("a header or the end mark of a tar should be there")
    block = _read(file, at, _BLOCK, end)
    if block == bytes(_BLOCK):
        return None, block
    try:
        header = TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Damage(str(error)) from None
    if header.size < 0:
        raise _Damage(f"a size of {header.size} bytes")
    return header, block


def _with_records(
    file: IO[bytes], header: TarInfo, block: bytes, at: int, end: int, records: dict[str, str]
) -> tuple[TarInfo, int]:
    """A member whose data, or sparse maps, begin at `at`, with what pax records say of it; and where they end."""
    if header.type == tarfile.GNUTYPE_SPARSE:
        header.sparse = b""
        more = block[482]
        while more:
            more, at = _read(file, at, _BLOCK, end)[504], at + _BLOCK
    if _SPARSE in records:
        header.sparse = b""
    header.name = records.get(f"{_SPARSE}name", records.get("path", header.name))
    if header.isdir():
        header.name = header.name.rstrip("/")
    if "size" in records:
        header.size = _number(records["size"])
    header.offset_data = at
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    return header, at + _blocks(header.size) * has_data


def _records(data: bytes) -> dict[str, str]:
    """What pax records `<their length> <key>=<value>\\n` say of name, size and sparseness; the last of a key counts."""
    found, at = {}, 0
    while at < len(data) and data[at]:  # some fill up with zeros
        space = data.find(b" ", at, at + 9)
        until = at + _number(_text(data[at:space]) if space > at else "")
        equals = data.find(b"=", space, until)
        if equals < 0 or until > len(data) or data[until - 1 : until] != b"\n":
            raise _Damage(f"an extended header with a broken record at its byte {at}")
        key = _text(data[space + 1 : equals]) if equals - space < 64 else ""
        if key.startswith(_SPARSE) and key != f"{_SPARSE}name":
            key = _SPARSE  # one for all: what is kept does not grow with the records
        if key in _KEYS:
            value = _text(data[equals + 1 : until - 1])
            found[key] = value.rstrip("/") if key == "path" else value
        at = until
    return found


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise _Damage(f"an extended header with {digits[:20]!r} for a number")
    return int(digits)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _read(file: IO[bytes], at: int, size: int, end: int) -> bytes:
    if at + size > end:
        raise _Damage("the file ends inside a header", cut=True)
    file.seek(at)
    data = file.read(size)
    if len(data) != size:
        raise _Damage(f"the file ended at byte {at + len(data)} while it was read")
    return data


def _blocks(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // _BLOCK) * _BLOCK


def key_at(file: IO[bytes], size: int, start: int, offset: int) -> str:
    """Key of the member whose data begin at `offset`; `start` is the end of any member before it.

    Reading forward from a member's end meets the extra headers of a long name in their order.

    Args:
        size: of the file.
    """
    for member in members_of(file, file.name, size, _blocks(start), on_zeros=lambda zeros: None):
        if member.offset_data == offset:
            named = split_name(member.name)
            assert named is not None, f"{member.name} was indexed without a key"
            return named[0]
    raise ValueError(f"{file.name}: no member begins at byte {offset}; the shard changed after it was indexed")


def sibling_at(file: IO[bytes], size: int, start: int, offset: int, suffix: str) -> tuple[int, int] | None:
    """Offset and size of the plain file of a suffix that has the key of the member whose data begin at `offset`.

    It is looked for from `start`, the end of any image before it, to the first member of another key behind the image.
    """
    key, before = None, dict[str, tuple[int, int]]()
    for member in members_of(file, file.name, size, _blocks(start), on_zeros=lambda zeros: None):
        named = split_name(member.name)
        is_one = named is not None and named[1] == suffix and member.isreg() and not member.issparse()
        if named is not None and member.offset_data == offset:
            key = named[0]
            if key in before:
                return before[key]
        elif key is not None and (named is None or named[0] != key):
            return None
        elif named is not None and is_one and key is None:
            before[named[0]] = (member.offset_data, member.size)
        elif is_one:
            return member.offset_data, member.size
    return None
