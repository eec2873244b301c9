from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="triton, with its assembler, is not installed",
)
REGISTERS = {80: 232, 89: 232, 90: 216}  # of a thread: a little above what is found; 255 is the most there are
PRODUCTS = {80: "mma", 89: "mma", 90: "wgmma"}


def check(capability: int, width: int) -> None:
    from grappa_dist.search.triton_topk import TILE
    from tests.search.triton_compiled import SHARED_BYTES, compiled

    found = compiled(capability, width=width)
    assert found.stack == 0  # nothing is spilled
    assert found.registers <= REGISTERS[capability]
    assert found.shared <= SHARED_BYTES[capability]
    assert found.narrow == 0  # every row is loaded 16 bytes at a time,
    assert found.asynchronous >= 16 or width <= TILE.columns  # and none is waited for at once
    assert found.products == PRODUCTS[capability]


@pytest.fixture(autouse=True)
def nothing_compiled_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_kernel_spills_nothing_and_loads_sixteen_bytes_asynchronously_on_an_h100() -> None:
    check(90, 384)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("width", [64, 384, 768, 1024])
def test_the_kernel_spills_nothing_on_any_gpu_at_any_width(capability: int, width: int) -> None:
    check(capability, width)


def test_no_number_of_rows_or_targets_compiles_the_kernel_anew() -> None:
    from grappa_dist.search.triton_topk import top_scores_kernel
    from tests.search.triton_compiled import CONSTANTS, POINTERS

    constants = {p.name for p in top_scores_kernel.params if p.is_constexpr}
    compiled_for = {p.name for p in top_scores_kernel.params if not p.do_not_specialize}
    assert constants == set(CONSTANTS)
    assert compiled_for - constants == set(POINTERS)  # else it would be for 1, and for what 16 divides


@pytest.mark.parametrize(
    ("blocks", "tiles", "splits"),
    [
        (1, 1, 1),
        (1, 32, 32),  # as many as there are tiles
        (2, 1000, 63),  # 16 tiles each, by 126 of 132 programs
        (64, 32, 2),
        (128, 32, 1),  # 97 % of the programs work at once
        (140, 32, 8),  # two rounds of 32 tiles, or nine of four
        (5000, 1000, 1),
    ],
)
def test_targets_are_divided_where_rows_alone_leave_a_gpu_idle(blocks: int, tiles: int, splits: int) -> None:
    from grappa_dist.search.triton_topk import num_splits

    assert num_splits(blocks, tiles, programs=132) == splits
