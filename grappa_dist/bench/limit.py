"""The arithmetic limit of a device: what it reaches in one large matrix product, measured and not read off a sheet."""

from __future__ import annotations

import torch

from benchmarks.harness import timed

_LARGE = {"cpu": 2048, "cuda": 8192}  # side of the product
_RUNS = 5


def arithmetic_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second, a multiplication and an addition being two; the fastest of a few runs."""
    side = _LARGE[device.type]
    a = torch.ones(side, side, device=device, dtype=dtype)

    def product() -> None:
        a @ a
        wait_for(device)

    product()  # compiles or loads what it needs
    return 2.0 * side**3 / min(timed(product)[1].seconds for _ in range(_RUNS))


def wait_for(device: torch.device) -> None:
    """Until what it was asked to compute is there: a GPU is asked ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
