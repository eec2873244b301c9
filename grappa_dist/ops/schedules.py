"""Learning-rate factors as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """Factor in [0, 1] of the learning rate for `step` of 0..total: a half cosine from 1 down to 0 at `total`.

    The first `warmup` steps climb to it in a straight line that starts above 0: no step is spent on a rate of zero.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"cosine: warmup must lie in [0, total) with total = {total}, got {warmup}")
    if not 0 <= step <= total:
        raise ValueError(f"cosine: step must lie in [0, {total}], got {step}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
