"""Checkpoints of the k-means of one K: written, mapped again after a kill, and passed over where they are damaged.

A file holds a tensor for each part of the method, and its numbers in the metadata. It may be as large as all centroids,
which no process need hold: it is written by pieces and read as a map.

Shapes: K centroids, D dimensions, k rows drawn so far, M candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grappa_dist.bucket import bucket_of, refreshed, send
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import map_file, open_tensors, rename, replace
from grappa_dist.kmeans.lloyd import KMeansState
from grappa_dist.kmeans.methods import Checkpoint
from grappa_dist.kmeans.seeding import SeedingCandidates, SeedingState
from grappa_dist.storage import open_to_read, open_to_write

CHECKPOINT_FILE = "progress.safetensors"
PREVIOUS_FILE = "previous.safetensors"  # the checkpoint before it
_JOB, _DIGEST = "job", "digest"  # in the metadata of a checkpoint, beside its parts; earlier versions wrote neither
SEEDING_SAVE_S = 30.0  # between two saves during an initialisation, whose rounds may be many and short
PIECE_ROWS = 4096  # of centroids that a checkpoint is written and read by
_DTYPES: dict[np.dtype[Any], str] = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
SEND_S = 20.0  # between two checkpoints that go to the bucket of a run


def checkpoint_saver(path: Path, rank: int) -> Callable[[Checkpoint], None]:
    """A function that saves, on rank 0, every update, and an initialisation every `SEEDING_SAVE_S` seconds."""
    last = sent = -math.inf

    def save(checkpoint: Checkpoint) -> None:
        nonlocal last, sent
        seeding = any(state.seeded for state in checkpoint.values())
        if rank == 0 and not (seeding and time.monotonic() - last < SEEDING_SAVE_S):
            save_checkpoint(path, checkpoint)
            last = time.monotonic()
            if last - sent > SEND_S:
                send(path)
                sent = last

    return save


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the k-means checkpoint: a tensor for each part, and its numbers in the metadata; keeps the one before."""
    tensors = {part: _tensor(state) for part, state in checkpoint.items()}
    figures = {part: json.dumps(_figures(state)) for part, state in checkpoint.items()}
    figures |= {_JOB: path.parent.name, _DIGEST: str(checkpoint_digest(checkpoint))}
    if path.exists():
        rename(path, path.with_name(PREVIOUS_FILE))
    replace(path, lambda temporary: _write_tensors(temporary, tensors, figures))


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A .safetensors file; tensors may be mapped, and no copy of a whole one is made."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        described = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**described, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open_to_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for start in range(0, len(tensor), PIECE_ROWS):
                file.write(tensor[start : start + PIECE_ROWS].tobytes())


def _map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of such a file, mapped; its header is that of a file which safetensors has opened."""
    with open_to_read(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    content, found = map_file(path)[8 + size :], dict[str, np.ndarray]()
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            found[name] = content[begin:end].view(dtypes[about["dtype"]]).reshape(about["shape"])
    return found


def _tensor(state: KMeansState) -> np.ndarray:
    """Centroids (K, D); during an initialisation the places of the rows drawn, (k,) int64, or for its candidates (M, 3)
    int64: places, how often they count, and the order in which they were picked."""
    seeded = state.seeded
    if seeded is None:
        return state.centroids
    if seeded.candidates is None:
        return seeded.places.numpy()
    places, times = seeded.candidates.places.numpy(), seeded.candidates.times.numpy()
    picked = np.full(len(places), -1)
    picked[np.searchsorted(places, seeded.places.numpy())] = np.arange(len(seeded.places))
    return np.stack([places, times, picked], 1)


def _figures(state: KMeansState) -> list[Any]:
    return [state.inertia, state.repaired, *([state.seeded.drawn] if state.seeded else [])]


def newest_checkpoint(context: RankContext, path: Path) -> Checkpoint:
    """The newest k-means checkpoint that no rank finds damaged, the same on all ranks; {} without one.

    The damaged ones are set aside.

    Raises:
        RuntimeError: ranks read different contents.
    """
    refreshed(path)
    sent = bucket_of(path) is not None  # then the one before is known to the machine of rank 0 alone
    for file in (path,) if sent else (path, path.with_name(PREVIOUS_FILE)):
        checkpoint, problem = load_checkpoint(file)
        if context.set_aside_damaged(file, problem, "k-means checkpoint"):
            continue
        digests = context.comm.gather(torch.tensor([checkpoint_digest(checkpoint)], device=context.device))
        if len(set(torch.cat(digests).tolist())) > 1:
            raise RuntimeError(f"{file}: ranks read different contents")
        if checkpoint:
            return checkpoint
    return {}


def load_checkpoint(path: Path) -> tuple[Checkpoint, str]:
    """The saved checkpoint, {} without a file, and what is wrong with the file, "" when nothing is."""
    if not path.exists():
        return {}, ""
    checkpoint = dict[str, KMeansState]()
    try:
        with open_tensors(path, lambda: safe_open(path, "np")) as file:
            figures = dict(file.metadata())
            job, digest = figures.pop(_JOB, path.parent.name), figures.pop(_DIGEST, None)
            tensors = _map_tensors(path)
            for part, text in figures.items():
                checkpoint[part] = _state(tensors[part], *json.loads(text))
                if problem := checkpoint[part].problem():
                    return {}, f"{part}: {problem}"
    except (SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:  # or of another program
        return {}, str(error)
    if job != path.parent.name:
        return {}, f"it was written for {job}"
    if digest is not None and digest != str(checkpoint_digest(checkpoint)):
        return {}, "its content does not have the checksum in it"
    return checkpoint, ""


def _state(tensor: np.ndarray, inertia: list[int], repaired: int, drawn: int | None = None) -> KMeansState:
    if drawn is None:
        return KMeansState(tensor, tuple(inertia), repaired)
    if tensor.dtype != np.int64 or not (tensor.ndim == 1 or tensor.shape[1:] == (3,)):
        raise ValueError(f"places are {tensor.shape} {tensor.dtype}")
    return KMeansState(np.zeros((0, 0), np.float32), (), seeded=_seeding_state(torch.from_numpy(tensor), drawn))


def _seeding_state(tensor: Tensor, drawn: int) -> SeedingState:
    if tensor.ndim == 1:
        return SeedingState(tensor, drawn)
    places, times, picked = tensor.unbind(1)
    order = picked.argsort(stable=True)[int((picked < 0).sum()) :]
    return SeedingState(places[order], drawn, SeedingCandidates(places.contiguous(), times.contiguous()))


def checkpoint_digest(checkpoint: Checkpoint) -> int:
    """A hash of 63 bits."""
    found = hashlib.blake2b(digest_size=8)
    for part in sorted(checkpoint):
        state, tensor = checkpoint[part], _tensor(checkpoint[part])
        found.update(json.dumps([part, *_figures(state), tensor.shape]).encode())
        for start in range(0, len(tensor), PIECE_ROWS):
            found.update(tensor[start : start + PIECE_ROWS].tobytes())
    return int.from_bytes(found.digest(), "big") >> 1
