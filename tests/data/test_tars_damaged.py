"""Thousands of damaged tars: each is refused with one clear error, or its rows are read or known to be bad."""

from __future__ import annotations

import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import index_shard, scan
from grappa_dist.data.remote_index import _Stream
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_tar
from tests.mutations import mutations

Damage = Callable[[bytearray, np.random.Generator], bytearray]
MUTATIONS = mutations(300)
BLOCK = 512
LIMIT_S = 20.0  # of one tar; milliseconds are usual


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"a tar of some KiB was not read within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rows_of_stream(data: bytes, piece: int = 700) -> list[tuple[int, ...]] | str:
    """What indexing finds as the bytes come from a store, or the reason why it is refused."""
    stream = _Stream(iter([data[at : at + piece] for at in range(0, len(data), piece)]))
    try:
        return cast(list[tuple[int, ...]], scan(cast(IO[bytes], stream), "t.tar", len(data)).rows.tolist())
    except ValueError as error:
        return str(error).partition("t.tar: ")[2]


def rows_of_file(path: Path) -> list[tuple[int, ...]] | str:
    try:
        return cast(list[tuple[int, ...]], index_shard(path)[0].tolist())
    except ValueError as error:
        return str(error).partition("t.tar: ")[2]


def random_bytes(tar: bytearray, draws: np.random.Generator) -> bytearray:
    for place in draws.integers(0, len(tar), draws.integers(1, 9)):
        tar[place] = draws.integers(256)
    return tar


def cut(tar: bytearray, draws: np.random.Generator) -> bytearray:
    return tar[: draws.integers(len(tar))]


def header_with_a_valid_checksum(tar: bytearray, draws: np.random.Generator) -> bytearray:
    """Any field of some block may be anything, and the block says that it is a whole header."""
    start = int(draws.integers(len(tar) // BLOCK)) * BLOCK
    for place in draws.integers(0, BLOCK, draws.integers(1, 13)):
        tar[start + place] = draws.integers(256)
    return with_checksum(tar, start)


def with_checksum(tar: bytearray, start: int) -> bytearray:
    tar[start + 148 : start + 156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + BLOCK])
    return tar


def size_field(tar: bytearray, draws: np.random.Generator) -> bytearray:
    """A header says another size, in octal digits, in base 256 or in a pax record, and perhaps another type."""
    headers = [at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    start = headers[int(draws.integers(len(headers)))]
    size = int(draws.choice([0, 1, 5, 511, 512, 513, len(tar), 2**20 + 1, 2**31, 2**32, 2**60])) + int(
        draws.integers(3)
    )
    size = size * int(draws.choice([1, 1, -1])) + int(draws.integers(2)) * 2**63
    how = draws.integers(3)
    if how == 0:
        tar[start + 124 : start + 136] = b"%011o\0" % (abs(size) % 8**11)
    elif how == 1:
        tar[start + 124 : start + 136] = (size % 2**96 | (size >= 0) << 95).to_bytes(12, "big")
    else:
        text = draws.choice([str(size), "9" * 5000, "abc", "", "1e3", "٣", f" {size}", f"{size}\n7 a=\n"])
        tar[start:start] = pax_header({str(draws.choice(["size", "GNU.sparse.size", "GNU.sparse.map"])): text})
    if draws.random() < 0.3:
        tar[start + 156] = int(draws.choice(list(b"xgXLKS0125DV")))
    return with_checksum(tar, start)


def pax_header(records: dict[str, str]) -> bytes:
    header = bytearray(tarfile.TarInfo.create_pax_global_header(records))
    header[156] = ord("x")
    return bytes(with_checksum(header, 0))


def blocks_moved(tar: bytearray, draws: np.random.Generator) -> bytearray:
    blocks = [tar[i : i + BLOCK] for i in range(0, len(tar), BLOCK)]
    places = draws.integers(0, len(blocks), 3)
    blocks.insert(int(places[0]), blocks.pop(int(places[1])))
    return bytearray().join(blocks[: len(blocks) - int(places[2] % 3)])


def outcomes_of(tar: Path) -> Counter[str]:
    outcomes = Counter[str]()
    try:
        shards = ImageShards.open([tar], None)
    except ValueError as error:
        return Counter(["refused" if "t.tar" in str(error) else "without a name"])
    for row, data in enumerate(shards.images(range(len(shards)))):
        outcomes["bad" if isinstance(data, BadImage) else "read"] += 1
        assert shards.where(row)
        try:
            shards.labels(row)
        except ValueError:
            outcomes["bad labels"] += 1
    return outcomes


@pytest.mark.parametrize("damage", [random_bytes, cut, header_with_a_valid_checksum, blocks_moved, size_field])
@pytest.mark.parametrize(
    "format",
    [
        tarfile.USTAR_FORMAT,
        pytest.param(tarfile.GNU_FORMAT, marks=pytest.mark.long),
        pytest.param(tarfile.PAX_FORMAT, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_tar_is_refused_or_its_rows_are_read_or_bad(tmp_path: Path, format: int, damage: Damage) -> None:
    long = "d" * 70 + "/" + "e" * 80
    members = {f"{key}{suffix}": key.encode() * 90 for key in ("a", "b", long) for suffix in (".jpg", ".json", ".txt")}
    whole = write_tar(tmp_path / "whole.tar", members, format).read_bytes()
    draws, outcomes = np.random.default_rng(format), Counter[str]()
    for _ in range(MUTATIONS):
        (tmp_path / "t.tar").write_bytes(damage(bytearray(whole), draws))
        with time_limit():
            outcomes += outcomes_of(tmp_path / "t.tar")
            assert rows_of_stream((tmp_path / "t.tar").read_bytes()) == rows_of_file(tmp_path / "t.tar")
    assert outcomes["read"] > MUTATIONS / 2
    assert outcomes["without a name"] == 0
    assert outcomes["refused"] + outcomes["bad"] + outcomes["bad labels"] > 0


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Of any size, be it in base 256."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % 2**96 | (size >= 0) << 95).to_bytes(12, "big")
    return bytes(with_checksum(block, 0))


def member(name: str, data: bytes = b"image") -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def sparse_header(name: str) -> bytes:
    """One that says that its map goes on in the next block."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[482:495] = b"\1" + b"%011o\0" % 5
    return bytes(with_checksum(block, 0))


DIGITS = b"%d comment=" % 2**20 + b"9" * (2**20 - 17) + b"\n"  # one record; a search for \d+ tries each of its places


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (header("b.jpg", -512), 1),
        (header("b.jpg", -5), 1),
        (header("x", -5, tarfile.XHDTYPE), 1),
        (header("x", -5, tarfile.GNUTYPE_LONGNAME), 1),
        (header("x", 2**60, tarfile.XHDTYPE), 1),
        (header("x", 2**70, tarfile.XHDTYPE), 1),
        (header("x", 8**11 - 1, tarfile.GNUTYPE_LONGNAME), 1),
        (header("x", 2**21, tarfile.XHDTYPE) + b"%d comment=" % 2**21 + bytes(2**21 - 16), 1),
        (header("x", 2**21, tarfile.GNUTYPE_LONGNAME) + b"n" * 2**21, 1),
        (header("b.jpg", 2**70), 2),
        (pax_header({"size": "-5"}), 1),
        (pax_header({"size": "9" * 5000}), 1),
        (header("x", 2**19, tarfile.XHDTYPE) + b"2 " * 2**18, 1),
        (sparse_header("b.jpg") + (bytes(504) + b"\1" + bytes(7)) * 9, 2),
    ],
)
def test_a_tar_is_damaged_from_a_header_on_that_cannot_be_true_here_and_on_a_store(
    tmp_path: Path, damage: bytes, rows: int
) -> None:
    for before, found in ((member("a.jpg"), Counter(read=1, bad=rows)), (b"", Counter({"refused": 1}))):
        tar = before + damage + member("c.jpg") + bytes(2 * BLOCK)
        (tmp_path / "t.tar").write_bytes(tar)
        with time_limit():
            assert outcomes_of(tmp_path / "t.tar") == (found if before or rows == 1 else Counter(bad=2))
            assert rows_of_stream(tar) == rows_of_file(tmp_path / "t.tar")


def test_a_long_name_for_all_members_is_none_and_costs_nothing(tmp_path: Path) -> None:
    record = b"%d path=" % 2**20
    everyone = header("g", 2**20, tarfile.XGLTYPE) + record + b"n" * (2**20 - len(record) - 7) + b".x.jpg\n"
    tar = everyone + b"".join(header(f"{row}.jpg", 0) for row in range(3000)) + bytes(2 * BLOCK)
    (tmp_path / "t.tar").write_bytes(tar)
    with time_limit():
        assert index_shard(tmp_path / "t.tar")[1].rows == 3000


def test_headers_of_headers_without_end_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    for many in (header("x", 0, tarfile.XHDTYPE) * 5000, header("x", len(DIGITS), tarfile.XHDTYPE) + DIGITS):
        (tmp_path / "t.tar").write_bytes(member("a.jpg") + many + member("c.jpg") + bytes(2 * BLOCK))
        with time_limit():
            assert outcomes_of(tmp_path / "t.tar") == Counter(read=2)
