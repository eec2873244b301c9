"""Our walk through a tar against that of tarfile, which is trusted where it neither fails nor hangs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.tars import DamagedTar, key_at, members_of
from tests.data.test_tars_damaged import cut, header, header_with_a_valid_checksum, random_bytes, time_limit
from tests.data.written import write_tar

Seen = list[tuple[str, int, int, bool, bool]]
LONG = "ü" * 40 + "d" * 70 + "/" + "e" * 120


def seen(member: tarfile.TarInfo) -> tuple[str, int, int, bool, bool]:
    return member.name, member.offset_data, member.size, member.isreg(), member.isdir()


def by_tarfile(data: bytes) -> Seen | None:
    """None where tarfile itself fails."""
    try:
        with time_limit(), tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
            return [seen(member) for member in tar]
    except (tarfile.TarError, ArithmeticError, ValueError, LookupError, MemoryError, TimeoutError):
        return None


def ours(data: bytes) -> tuple[Seen, bool]:
    """The members, and whether the tar is whole."""
    found: Seen = []
    try:
        for member in members_of(io.BytesIO(data), "t.tar", len(data)):
            found.append(seen(member))
    except DamagedTar as error:
        return found, error.offset > len(data)  # never
    return found, True


def all_kinds(path: Path, format: int) -> bytes:
    """Files, folders, links and a device, with short names and, where the format can, long ones."""
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(["a.jpg", "b/c.d.jpg", *([LONG] * (format != tarfile.USTAR_FORMAT)), "e"]):
            for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
                member = tarfile.TarInfo(f"{name}{kind.decode()}")
                member.type, member.linkname, member.mtime = kind, name, 0.5 * number
                member.size = 300 * number if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path.read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    whole, draws, compared = all_kinds(tmp_path / "t.tar", format), np.random.default_rng(format), 0
    assert ours(whole) == (by_tarfile(whole), True)
    for damage in (random_bytes, cut, header_with_a_valid_checksum):
        for _ in range(150):
            data = bytes(damage(bytearray(whole), draws))
            expected, (found, is_whole) = by_tarfile(data), ours(data)
            if expected is not None:  # it stops at damage without a word, and takes broken pax records for none
                compared += 1
                assert found[: len(expected)] == expected[: len(found)]  # it ends at the first zeros
                assert not is_whole or found[: len(expected)] == expected
    assert compared > 200


def test_of_several_names_for_a_member_the_first_counts_as_for_tarfile(tmp_path: Path) -> None:
    def pax(**records: str) -> bytes:
        block = bytearray(tarfile.TarInfo.create_pax_global_header(records))
        return bytes(block)

    def own(**records: str) -> bytes:
        data = pax(**records)
        return header("x", len(data[512:].rstrip(b"\0")), tarfile.XHDTYPE) + data[512:]

    def long(name: str) -> bytes:
        return header("x", len(name) + 1, tarfile.GNUTYPE_LONGNAME) + name.encode() + bytes(512 - len(name))

    file, end = header("h.jpg", 0), bytes(1024)
    for before in (
        *(
            own(path="p.jpg") + long("l.jpg"),
            long("l.jpg") + own(path="p.jpg"),
            own(path="p") + own(path="q", size="0"),
        ),
        *(own(comment="c"), long("l.jpg"), long("k") + long("l"), pax(comment="g") + own(path="p/"), own(path="ü")),
    ):
        data = before + file + header("i.jpg", 0) + end
        assert ours(data) == (by_tarfile(data), True)
        assert len(ours(data)[0]) == 2


ALLOCATIONS = """
import sys, tracemalloc
from grappa_dist.data.tars import members_of
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        tracemalloc.start()
        members = sum(1 for _ in members_of(file, name))
        print(members, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
"""


def test_a_tar_of_many_members_takes_no_more_memory_than_one_of_few(tmp_path: Path) -> None:
    sizes, names = (100, 20_000), list[str]()
    for members in sizes:
        names.append(str(tmp_path / f"{members}.tar"))
        Path(names[-1]).write_bytes(b"".join(header(f"{row:07d}.jpg", 0) for row in range(members)) + bytes(1024))
    # A process without other threads, whose allocations would be counted
    command = [sys.executable, "-c", ALLOCATIONS, *names]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found, peaks = zip(*(map(int, line.split()) for line in printed), strict=True)
    assert found == sizes
    assert peaks[1] < peaks[0] + 100_000  # 5 bytes a member


def test_a_key_is_found_from_the_end_of_any_member_before_it(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {f"{LONG}{row}.jpg": bytes(row * 200) for row in range(5)})
    with open(tar, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        places = [(m.offset_data, m.offset_data + m.size) for m in members_of(file, tar)]
        for row, (offset, _) in enumerate(places):
            for start in [0, *(end for _, end in places[:row])]:
                assert key_at(file, size, start, offset) == f"{LONG}{row}"
        with pytest.raises(ValueError, match=r"t\.tar: no member begins at byte 7; the shard changed"):
            key_at(file, size, 0, 7)
