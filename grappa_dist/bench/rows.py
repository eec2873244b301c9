"""Rows to measure on: drawn ones that are shaped like features of images, or real ones from .npy files.

Shapes: P rows, D dimensions, C classes of all tasks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from grappa_dist.distributed.rows import Rows
from grappa_dist.search.fixed_point import to_grid

TASKS, CLASSES, SUBCLASSES = 8, 60, 8  # of all, of a task, of a class
_SHARES = (0.2, 0.2, 0.2, 0.15, 0.25)  # of a row's energy: what all rows share, its task, class, sub-class, itself
SHARD_ROWS = 1000  # of a shard that make_shards.py writes by default
_BLOCK = 8192


def drawn_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """Unit grid rows (P, D) float32: a mixture in a mixture in a mixture, with classes of uneven sizes.

    The spectrum decays as a power law, and is turned so that no algorithm finds the large directions first in memory.
    """
    draws = np.random.default_rng(seed)
    spectrum = (1.0 + np.arange(dim)) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    turn = np.linalg.qr(draws.standard_normal((dim, dim)))[0]
    mean, task, kind, sub, own = (share**0.5 * spectrum for share in _SHARES)
    num_kinds = TASKS * CLASSES
    tasks = mean * draws.standard_normal(dim) + task * draws.standard_normal((TASKS, dim))
    kinds = np.repeat(tasks, CLASSES, axis=0) + kind * draws.standard_normal((num_kinds, dim))
    subs = np.repeat(kinds, SUBCLASSES, axis=0) + sub * draws.standard_normal((num_kinds * SUBCLASSES, dim))
    sizes = draws.permutation((1.0 + np.arange(len(subs))) ** -0.5)
    rows = np.empty((num_rows, dim), dtype=np.float32)
    for start in range(0, num_rows, _BLOCK):
        out = rows[start : start + _BLOCK]
        picked = draws.choice(len(subs), size=len(out), p=sizes / sizes.sum())
        x = (subs[picked] + own * draws.standard_normal((len(out), dim))) @ turn
        out[:] = _on_grid(x / np.linalg.norm(x, axis=1, keepdims=True))
    return rows


def read_rows(source: Path, limit: int | None) -> tuple[np.ndarray, str]:
    """Unit grid rows (P, D) of one .npy file or of all under a folder, in order of their names, and what they are.

    Rows that are all zero stand for images that did not decode, and are left out.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.npy"))
    if not files:
        raise ValueError(f"--features: {source} is no .npy file and no folder with any; expected float32 rows")
    parts: list[np.ndarray] = []
    for file in files:
        if limit is not None and sum(len(part) for part in parts) >= limit:
            break
        parts.append(_read(file, parts[0].shape[1] if parts else None))
    rows = np.concatenate(parts)[:limit]
    return rows, f"real: {len(rows)} rows of {len(parts)} file{'s' * (len(parts) > 1)} in {source.name}"


def _read(file: Path, dim: int | None) -> np.ndarray:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--features: {file} is not a readable .npy file ({error})") from None
    if rows.ndim != 2 or rows.dtype != np.float32 or (dim is not None and rows.shape[1] != dim):
        expected = f"(rows, {dim or 'dimensions'}) float32"
        raise ValueError(f"--features: {file} has {rows.shape} {rows.dtype}, expected {expected}")
    norms = np.linalg.norm(rows, axis=1)
    rows, norms = rows[norms != 0], norms[norms != 0]
    if not np.all(np.abs(norms - 1) < 2**-7):
        raise ValueError(f"--features: {file} has rows of norm {norms.min():.4g} to {norms.max():.4g}, expected 1")
    return _on_grid(rows)


def _on_grid(rows: np.ndarray) -> np.ndarray:
    """All sides are given these values, so none gains by rounding."""
    return to_grid(torch.from_numpy(rows)).numpy()


def in_shards(rows: np.ndarray, shard_rows: int = SHARD_ROWS) -> Rows:
    """The rows as a run holds them: in shards, none of them bad."""
    shards = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    return Rows(shards, [np.ones(len(shard), dtype=bool) for shard in shards])


def squared_error(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> float:
    """Sum of the squared distances of rows to the centroids of their labels, in float64: the common objective."""
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        own = centroids[labels[start : start + _BLOCK]].astype(np.float64)
        total += float(np.square(rows[start : start + _BLOCK] - own).sum())
    return total
