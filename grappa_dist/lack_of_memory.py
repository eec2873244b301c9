"""A GPU whose memory is full ends the work at once, with the setting that takes less of it: trying again is no help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def naming_lack_of_memory(what: str, advice: str = "") -> Iterator[None]:
    """Gives torch's error another form, in which a job is not started again.

    Args:
        what: does not fit.
        advice: which setting to change, and its value; "" leaves that to whoever shows the error.

    Raises:
        ValueError: in one line, in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = (str(error) or "out of memory").splitlines()[0]
        says = f": {advice} ({first_line})" if advice else f" ({first_line})"
        raise ValueError(f"{what} does not fit the GPU's memory{says}") from None
