"""Jobs of three adaptor sets in the tiny world, trained in all ways that must give the same sets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grappa_dist.artifacts import Store
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages import adapt_job
from grappa_dist.stages.adapt_job import AdaptJob, train_adaptors
from grappa_dist.training.compile import compile_if_faster
from tests.stages import tiny

KS = (3, 4, 5)
CLIP = 0.05  # of gradients whose norms are about 0.1 to 0.5: it scales, and each set by another factor
SCANT = 1_000_000  # bytes, for three images of three sets and their classifiers
SETTINGS: dict[str, Any] = {"clip_norm": CLIP, "epochs": 3, "checkpoint_steps": 2}


def job_in(folder: Path, out: str, ks: tuple[int, ...] = KS, **adapt: Any) -> AdaptJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings = tiny.config(paths, adapt={**SETTINGS, **adapt})
    return tiny.adapt_job(settings, Store(folder / out), {k: folder / f"labels-{k}" for k in ks})


def run(comm: Comm, job: AdaptJob, **watched: Any) -> None:
    train_adaptors(tiny.Watcher(**watched).context(comm), job)


def train_all_ways(comm: Comm, folder: Path) -> None:
    """Together in one job on these ranks, and in a world of one also each set alone."""
    run(comm, job_in(folder, f"packed-{comm.size}"))
    if comm.size == 1:
        for k in KS:
            run(comm, job_in(folder, "alone", (k,)))
        run(comm, job_in(folder, "unclipped", clip_norm=None))
        run(comm, job_in(folder, "sparing", micro_batch=3, activation_checkpointing=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapt_job, "usable_bytes", lambda device, sharing: SCANT)
            run(comm, job_in(folder, "auto", micro_batch="auto"))
            seconds = iter((2.0, 1.0))  # of a plain pass and of a compiled one
            cheap = partial(compile_if_faster, backend="aot_eager", measure=lambda _: next(seconds))
            patch.setattr(adapt_job, "compile_if_faster", cheap)
            run(comm, replace(job_in(folder, "compiled", micro_batch=5), compiled=True))
    else:
        run(comm, job_in(folder, "zero", micro_batch=5, zero_stage=2))
        stopped = job_in(folder, "stopped", zero_stage=1)
        run(comm, stopped, stop_after=3 if comm.rank == 1 else None)


def weights(folder: Path, out: str, k: int, **adapt: Any) -> dict[str, torch.Tensor]:
    (one,) = job_in(folder, out, (k,), **adapt).sets
    assert one.artifact.complete
    return load_file(one.artifact.path / ADAPTORS_FILE)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():  # sums in another order, which Adam's first steps enlarge where gradients vanish
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)
