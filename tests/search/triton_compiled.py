"""What the kernel compiles to, without a GPU: registers, what is spilled, shared memory, and how it loads.

`python -m tests.search.triton_compiled` prints a table of tiles and widths; `python -m tests.search.triton_compiled
--tile 128x128x64 --warps 4` one of that tile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grappa_dist.search.triton_topk import TILE, Tile, top_scores_kernel

POINTERS = {"x": "*bf16", "y": "*bf16", "offsets": "*fp32", "values": "*fp32", "columns": "*i32"}
SIZES = ("num_rows", "num_targets", "tiles_of_one")
CONSTANTS = ("WIDTH", "ROWS", "TARGETS", "COLUMNS", "WIDEN")
SHARED_BYTES = {80: 163 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10}  # that a program may have, by compute capability


@dataclass(frozen=True)
class Compiled:
    """The kernel for one kind of GPU."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, where spilled registers go
    shared: int  # bytes of a program
    asynchronous: int  # loads of 16 bytes into shared memory that a program does not wait for
    narrow: int  # loads from global memory of fewer than 4 bytes
    products: str  # the instruction of the matrix units


def compiled(capability: int, tile: Tile = TILE, width: int = 384) -> Compiled:
    """The kernel for an sm_`capability`, about whose sizes nothing is known but the width of a row."""
    constants = (width, tile.rows, tile.targets, tile.columns, False)
    signature = POINTERS | dict.fromkeys(SIZES, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    first = len(POINTERS) + len(SIZES)
    source = ASTSource(
        top_scores_kernel,
        signature,
        {(first + place,): value for place, value in enumerate(constants)},
        {(place,): [["tt.divisibility", 16]] for place in range(len(POINTERS))},  # torch aligns its tensors
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = made.asm["ptx"]
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(
        registers,
        stack,
        made.metadata.shared,
        len(re.findall(r"cp\.async\.cg\S* *\[[^]]*\], *\[[^]]*\], *0x10", code)),
        len(re.findall(r"ld\.global\S*\.[bu](?:8|16)\b", code)),
        "wgmma" if "wgmma.mma_async" in code else "mma" if "mma.sync" in code else "none",
    )


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        asked = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", default=f"{TILE.rows}x{TILE.targets}x{TILE.columns}")
    parser.add_argument("--warps", type=int, default=TILE.warps)
    parser.add_argument("--widths", type=int, nargs="+", default=[384])
    options = parser.parse_args()
    rows, targets, columns = map(int, options.tile.split("x"))
    tile = replace(TILE, rows=rows, targets=targets, columns=columns, warps=options.warps)
    for capability in (80, 90):
        for width in options.widths:
            print(f"sm_{capability} D={width} {options.tile} {tile.warps} warps: {compiled(capability, tile, width)}")


if __name__ == "__main__":
    main()
