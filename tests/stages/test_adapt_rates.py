"""What is measured before it is known how many sets share a job takes no more memory than there is."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.models import PackedGrappa
from grappa_dist.stages import adapt
from grappa_dist.training.memory import image_bytes
from tests.stages import tiny
from tests.stages.multi_set import job_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    tiny.write_shards(folder / "images")
    return folder


def measured(
    folder: Path, patch: pytest.MonkeyPatch, usable: int, runs_with: int = 99, **settings: Any
) -> tuple[list[tuple[int, int]], adapt.Measured]:
    """Sets and images of the passes that are timed, where `usable` bytes seem free and fewer images may run."""
    timed, before = list[tuple[int, int]](), list[weakref.ref[PackedGrappa]]()

    def seconds(model: PackedGrappa, images: torch.Tensor) -> float:
        assert all(ref() is None for ref in before)  # one model after the other
        model.itself = [model]  # as some are held by what they are made of
        before.append(weakref.ref(model))
        timed.append((model.num_sets, len(images)))
        return 3.0 * model.num_sets * len(images)

    patch.setattr(adapt, "usable_bytes", lambda device, sharing: usable)
    patch.setattr(adapt, "images_that_fit", lambda model, images: min(images, runs_with))
    patch.setattr(adapt, "_train_s", seconds)
    found = adapt.measure_rates(tiny.CPU, job_in(folder, "rates", **settings))
    return timed, found


def test_images_are_as_many_as_two_sets_have_memory_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        image_bytes(adapt._model(job_in(folder, "rates"), count, tiny.CPU), recompute=False) for count in (1, 2)
    )
    assert one < two
    for usable, images in ((10**9, adapt.CPU_IMAGES), (5 * two, 5), (0, 1)):
        timed, found = measured(folder, monkeypatch, usable)
        assert timed == [(2, images), (1, images)]
        assert (found.budget.usable_bytes, found.budget.image_bytes, found.channels) == (usable, one, 16)
        assert (found.rates.shared_s, found.rates.set_s) == (0.0, 3.0)


def test_images_are_no_more_than_a_job_takes_at_a_time_or_a_gpu_was_seen_to_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(folder, monkeypatch, 10**9, micro_batch=3)[0] == [(2, 3), (1, 3)]
    assert measured(folder, monkeypatch, 10**9, runs_with=2)[0] == [(2, 2), (1, 2)]
