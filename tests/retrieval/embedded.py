"""Folders of embeddings as `embed` writes them, of drawn rows, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.config import Config
from grappa_dist.files import Sum, save_array, write_json
from grappa_dist.retrieval.index import IndexedModel
from grappa_dist.stages.run import Run
from tests.stages import tiny

CHANNELS, EACH, GROUPS = 8, 40, 6
BAD = 3  # the position of a bad image in each shard
MODEL = IndexedModel("", "average", "ab" * 32, None)


def write_embeddings(folder: Path, shards: Iterable[int], gone: Mapping[int, Sequence[int]] | None = None) -> Path:
    """Shards of EACH rows, by number: the same number is the same shard; `gone` has positions of images by shard."""
    entries = [_write_shard(folder, number, (gone or {}).get(number, ())) for number in shards]
    about = {"model": MODEL.variant, "model_sha256": MODEL.sha256, "gallery": MODEL.gallery}
    write_json(folder / "embeddings.json", {**about, "images": len(entries) * EACH, "shards": entries})
    return folder


def _write_shard(folder: Path, number: int, gone: Sequence[int]) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    centres = np.random.default_rng(7).normal(size=(GROUPS, CHANNELS))
    rows = centres[rng.integers(0, GROUPS, EACH)] + 0.5 * rng.normal(size=(EACH, CHANNELS))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[BAD] = 0
    name = f"shard-{number}"
    paths = {what: f"{name}/{what}.{'npy' if what == 'rows' else 'json'}" for what in ("rows", "keys", "names", "bad")}
    save_array(folder / paths["rows"], rows.astype(np.float32))
    write_json(folder / paths["keys"], [f"{place:09d}" for place in range(EACH)])
    write_json(folder / paths["names"], [f"{number}/{place}.png" for place in range(EACH)])
    write_json(folder / paths["bad"], {str(BAD): "no JPEG, PNG or WebP"})
    entry = {"shard": f"{name}.tar", "source": f"/nowhere/{name}.tar", "images": EACH, **paths}
    xxh3 = {what: Sum.of(folder / path).xxh3 for what, path in paths.items()}
    return {**entry, "xxh3": xxh3, **({"gone": list(gone)} if gone else {})}


def here(monkeypatch: pytest.MonkeyPatch) -> tiny.Here:
    """Lets `embed_images` work in this process, without Ray; what was asked of workers is in `asked`."""
    runner = tiny.Here()

    @contextmanager
    def running(config: Config, root: Path) -> Iterator[Run]:
        yield tiny.run_in(config, root, runner)

    monkeypatch.setattr("grappa_dist.export.running", running)
    return runner
