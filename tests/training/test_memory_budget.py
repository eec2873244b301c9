from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grappa_dist.training.memory import MemoryBudget, even_size

BYTES = st.integers(0, 10**6)


@given(st.integers(0, 10**4), st.integers(1, 10**3))
def test_parts_are_the_fewest_and_their_sizes_even(count: int, most: int) -> None:
    size = even_size(count, most)
    assert 1 <= size <= most
    sizes = [min(size, count - start) for start in range(0, count, size)]
    assert len(sizes) == -(-count // most)
    assert not sizes or max(sizes) - min(sizes) < len(sizes)


@given(BYTES, BYTES, st.integers(1, 512))
def test_as_many_images_as_fit_and_no_fewer_than_one(usable: int, image: int, most: int) -> None:
    images = MemoryBudget(usable, image).images(most)
    assert 1 <= images <= most
    assert images == 1 or images * image <= usable
    assert images == most or (images + 1) * image > usable


@given(BYTES, st.integers(0, 1000), st.lists(st.integers(0, 10**5), min_size=1, max_size=12), st.integers(1, 64))
def test_the_largest_sets_fit_together_and_one_more_would_not(
    usable: int, image: int, set_bytes: list[int], images: int
) -> None:
    count = MemoryBudget(usable, image).sets(set_bytes, lambda _: images)
    largest = sorted(set_bytes, reverse=True)

    def taken(sets: int) -> int:
        return sum(largest[:sets]) + sets * images * image

    assert 1 <= count <= len(set_bytes)
    assert count == 1 or taken(count) <= usable
    assert count == len(set_bytes) or taken(count + 1) > usable


@pytest.mark.parametrize(
    ("usable", "images", "expected"), [(10**9, 8, 4), (1000, 8, 2), (799, 8, 1), (0, 8, 1), (1000, 16, 1)]
)
def test_fewer_sets_where_memory_is_short(usable: int, images: int, expected: int) -> None:
    assert MemoryBudget(usable, 50).sets([10, 100, 20, 0], lambda _: images) == expected
