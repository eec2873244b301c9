"""Where shards end: limits kept, nothing lost, sizes as people write them."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grappa_dist.data.writer import member_bytes
from grappa_dist.make_shards.planning import cut, parse_bytes, tar_size


@given(st.lists(st.integers(512, 60_000)), st.none() | st.integers(1, 5), st.none() | st.integers(1, 90_000))
def test_shards_keep_their_limits_and_are_as_full_as_these_allow(
    sizes: list[int], rows: int | None, max_bytes: int | None
) -> None:
    starts = cut(sizes, rows, max_bytes)
    assert starts[0] == 0
    assert starts[-1] == len(sizes)
    for first, end in pairwise(starts):
        held, number = sum(sizes[first:end]), end - first
        assert number > 0 or not sizes
        assert rows is None or number <= rows
        assert max_bytes is None or number <= 1 or tar_size(held) <= max_bytes
        if end < len(sizes):  # it ended for a reason
            full = rows is not None and number == rows
            assert full or (max_bytes is not None and tar_size(held + sizes[end]) > max_bytes)


@pytest.mark.parametrize("sizes", [[0], [1], [512, 513], [4000] * 7, [9216 - 512], [9216 - 511]])
def test_the_size_of_a_tar_is_known_before_it_is_written(sizes: list[int]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    assert tar_size(sum(map(member_bytes, sizes))) == len(file.getvalue())


def test_sizes_are_read_as_people_write_them() -> None:
    texts = ["500MB", "1.5GiB", "1000000", "2k", " 3 MiB ", "1TB"]
    assert [parse_bytes(text) for text in texts] == [5 * 10**8, 3 * 2**29, 10**6, 2000, 3 * 2**20, 10**12]
    for text in ("", "MB", "-5", "5 apples", "1e9"):
        with pytest.raises(ValueError, match="no number of bytes; expected one such as 500MB"):
            parse_bytes(text)
