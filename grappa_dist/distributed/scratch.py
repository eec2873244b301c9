"""Tensors per row that live in an unnamed file of the node's temporary folder, not in the process's own memory.

The system keeps of them in memory what fits and writes the rest back; nothing is left behind, however the process ends.
"""

from __future__ import annotations

import math
import os
import tempfile

import numpy as np
import torch
from torch import Tensor


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU; TMPDIR decides which disk holds it.

    Raises:
        OSError: the disk has no room for it.
    """
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)
    numbers: np.dtype = torch.zeros(0, dtype=dtype).numpy().dtype
    num_bytes = math.prod(shape) * numbers.itemsize
    with tempfile.TemporaryFile(prefix="grappa-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is an error here, not a crash at some write
        except OSError as error:
            where = f"{tempfile.gettempdir()} (TMPDIR names another folder)"
            raise OSError(error.errno, f"{where}: {num_bytes} bytes of scratch: {error.strerror}") from error
        return torch.from_numpy(np.memmap(file, dtype=numbers, mode="r+", shape=shape))
