"""The file from which a stopped clustering goes on: where each of its parts stood."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from grappa_dist.distributed.lloyd import Progress
from grappa_dist.files import replacing
from grappa_dist.kmeans.methods import Trail
from grappa_dist.kmeans.seeding import Candidates, Seeded

SEEDING_SAVE_S = 30.0  # from one save of an initialisation that is under way to the next: rounds may be many and short


def saver(path: Path, rank: int) -> Callable[[Trail], None]:
    """Saves every update, and the initialisation now and then; on rank 0."""
    last = -math.inf

    def save(trail: Trail) -> None:
        nonlocal last
        seeding = any(progress.seeded for progress in trail.values())
        if rank == 0 and not (seeding and time.monotonic() - last < SEEDING_SAVE_S):
            save_trail(path, trail)
            last = time.monotonic()

    return save


def save_trail(path: Path, trail: Trail) -> None:
    tensors = {part: _tensor(progress) for part, progress in trail.items()}
    figures = {part: json.dumps(_figures(progress)) for part, progress in trail.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, figures)


def _tensor(progress: Progress) -> np.ndarray:
    """Centroids; or the places of the rows that are to be some, from which the rows are read again, (k,) int64; or, of
    the candidates for them, (M, 3) int64: places, how often they count, and the order in which they were picked."""
    seeded = progress.seeded
    if seeded is None:
        return progress.centroids
    if seeded.candidates is None:
        return seeded.places.numpy()
    places, times = seeded.candidates.places.numpy(), seeded.candidates.times.numpy()
    picked = np.full(len(places), -1)
    picked[np.searchsorted(places, seeded.places.numpy())] = np.arange(len(seeded.places))
    return np.stack([places, times, picked], 1)


def _figures(progress: Progress) -> list[Any]:
    return [progress.inertia, progress.repaired, *([progress.seeded.drawn] if progress.seeded else [])]


def load_trail(path: Path) -> tuple[Trail, str]:
    """What was saved, if anything, and what is wrong with it."""
    if not path.exists():
        return {}, ""
    trail = dict[str, Progress]()
    try:
        with safe_open(path, "np") as file:
            for part, text in file.metadata().items():
                trail[part] = _progress(file.get_tensor(part), *json.loads(text))
                if problem := trail[part].problem():
                    return {}, f"{path} is damaged ({part}: {problem}); delete it to begin this K again"
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:  # or what another program has written
        return {}, f"{path} is damaged ({error}); delete it to begin this K again"
    return trail, ""


def _progress(tensor: np.ndarray, inertia: list[int], repaired: int, drawn: int | None = None) -> Progress:
    if drawn is None:
        return Progress(tensor, tuple(inertia), repaired)
    if tensor.dtype != np.int64 or not (tensor.ndim == 1 or tensor.shape[1:] == (3,)):
        raise ValueError(f"places are {tensor.shape} {tensor.dtype}")
    return Progress(np.zeros((0, 0), np.float32), (), seeded=_seeded(torch.from_numpy(tensor), drawn))


def _seeded(tensor: Tensor, drawn: int) -> Seeded:
    if tensor.ndim == 1:
        return Seeded(tensor, drawn)
    places, times, picked = tensor.unbind(1)
    order = picked.argsort(stable=True)[int((picked < 0).sum()) :]
    return Seeded(places[order], drawn, Candidates(places.contiguous(), times.contiguous()))


def digest(trail: Trail) -> int:
    """63 bits that tell one state from another."""
    state = hashlib.blake2b(digest_size=8)
    for part in sorted(trail):
        progress, tensor = trail[part], _tensor(trail[part])
        state.update(json.dumps([part, *_figures(progress), tensor.shape]).encode())
        state.update(tensor.tobytes())
    return int.from_bytes(state.digest(), "big") >> 1
