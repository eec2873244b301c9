"""The file from which a stopped clustering goes on: where each of its parts stood after the last update."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grappa_dist.dist.lloyd import Progress
from grappa_dist.dist.methods import Trail
from grappa_dist.files import replacing


def save_trail(path: Path, trail: Trail) -> None:
    tensors = {part: progress.centroids for part, progress in trail.items()}
    figures = {part: json.dumps([progress.inertia, progress.repaired]) for part, progress in trail.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, figures)


def load_trail(path: Path) -> tuple[Trail, str]:
    """What was saved, if anything, and what is wrong with it."""
    if not path.exists():
        return {}, ""
    try:
        with safe_open(path, "np") as file:
            figures = {part: json.loads(text) for part, text in file.metadata().items()}
            return {
                part: Progress(file.get_tensor(part), tuple(inertia), repaired)
                for part, (inertia, repaired) in figures.items()
            }, ""
    except SafetensorError as error:
        return {}, f"{path} is damaged ({error}); delete it to begin this K again"


def digest(trail: Trail) -> int:
    """63 bits that tell one state from another."""
    state = hashlib.blake2b(digest_size=8)
    for part in sorted(trail):
        progress = trail[part]
        state.update(json.dumps([part, progress.inertia, progress.repaired, progress.centroids.shape]).encode())
        state.update(progress.centroids.tobytes())
    return int.from_bytes(state.digest(), "big") >> 1
