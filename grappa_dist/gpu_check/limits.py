"""What the machine reaches at most: products of random matrices, copies between host and device, its memory.

Constant matrices would be multiplied faster than real ones: a chip that switches less draws less power.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from grappa_dist.gpu_check.checks import BF16, FP32, FP64, GIGA, MEMORY, TERA, Figure, Found, Machine, NotHere

RUNS = 5
_TYPES = {BF16: torch.bfloat16, FP32: torch.float32, FP64: torch.float64}
_SIDES = {BF16: 8192, FP32: 8192, FP64: 4096}  # of the square matrices
_TINY_SIDE = 256


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has finished the work in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest_s(work: Callable[[], object], device: torch.device, runs: int = RUNS) -> float:
    """Seconds of the fastest of several runs, after one that loads what it needs."""
    work()
    taken = []
    for _ in range(runs):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def products(machine: Machine, kind: str) -> Found:
    """FLOP/s of one product of square matrices: 2 n^3 operations, no TF32."""
    side = machine.sized(_SIDES[kind], _TINY_SIDE)
    a, b = (torch.randn(side, side, device=machine.device).to(_TYPES[kind]) for _ in range(2))
    speed = 2 * side**3 / fastest_s(lambda: a @ b, machine.device)
    return Found(f"{side} x {side}", (Figure("", speed / TERA, "TFLOP/s"),), limits={kind: speed})


def memory(machine: Machine) -> Found:
    """Bytes/s of a copy within the device, read and written ones counted."""
    size = machine.sized(2**30, 2**20)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    speed = 2 * size / fastest_s(lambda: target.copy_(source), machine.device)
    return Found(f"{size / 2**20:.0f} MiB", (Figure("", speed / GIGA, "GB/s"),), limits={MEMORY: speed})


def copies(machine: Machine, way: str) -> Found:
    """Bytes/s between pinned memory of the host and the device; on a CPU between two places of its memory."""
    size = machine.sized(2**28, 2**20)
    on_gpu = machine.device.type == "cuda"
    host = torch.randint(256, (size,), dtype=torch.uint8)
    host = host.pin_memory() if on_gpu else host
    there = torch.empty(size, dtype=torch.uint8, device=machine.device)
    source, target = (host, there) if way == "h2d" else (there, host)
    expected = host.clone()
    there.copy_(host)
    speed = size / fastest_s(lambda: target.copy_(source, non_blocking=True), machine.device)
    wrong = "" if torch.equal(target.cpu(), expected) else "the bytes that arrived are not those that were sent"
    return Found(f"{size / 2**20:.0f} MiB", (Figure("", speed / GIGA, "GB/s"),), wrong)


def need_gpu(machine: Machine, why: str) -> None:
    """Raises NotHere on a CPU."""
    if machine.device.type != "cuda":
        raise NotHere(why)
