from __future__ import annotations

import pytest

from grappa_dist.stages.pseudo_label import groups, scratch_bytes


def test_small_clusterings_are_fitted_together_and_the_largest_alone() -> None:
    assert groups([64, 256, 1024, 4096], 192) == [[64, 256, 1024], [4096]]


def test_the_paper_s_eight_take_three_groups() -> None:
    paper = [256, 1024, 4096, 8192, 16384, 32768, 65536, 131072]
    assert groups(paper, 384) == [[256, 1024, 4096], [8192, 16384, 32768, 65536], [131072]]


@pytest.mark.parametrize("dim", [1, 8, 384, 2048])
@pytest.mark.parametrize("nums", [[], [1], [7, 7], [1, 2, 3, 4, 5], [512, 513, 10**6], [2**i for i in range(20)]])
def test_groups_hold_every_number_once_and_keep_to_both_bounds(nums: list[int], dim: int) -> None:
    found = groups(nums, dim)
    assert sorted(num for group in found for num in group) == sorted(nums)
    for group in found:
        assert sum(group) <= max(nums)
        scratch = [scratch_bytes(num, dim) for num in group]
        assert sum(scratch) <= max(2 * dim, *(scratch_bytes(num, dim) for num in nums))
