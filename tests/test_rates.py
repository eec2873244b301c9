"""Rates of a machine: measured on a small model, and taken from a run only for what they were measured on."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from grappa_dist import rates
from grappa_dist.data.shards import ImageShards
from grappa_dist.models.spec import build_backbone
from grappa_dist.rates import Rates, measure, some_images, store_rates, stored_rates
from tests.stages import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    paths = tiny.write_shards(tmp_path_factory.mktemp("images"))
    return some_images(ImageShards.open(paths, None))


@pytest.mark.parametrize("sets_per_job", [1, 2])
def test_every_rate_is_measured_and_nothing_of_the_process_or_the_backbone_changes(
    files: list[bytes], sets_per_job: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PART_S", 0.02)
    settings = tiny.config(["nowhere"], adapt={"sets_per_job": sets_per_job}, resources={"threads": 1})
    backbone, threads = build_backbone(settings.backbone), torch.get_num_threads()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    found = measure(settings, 2, backbone, [b"no image", *files], fuses=True)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    seconds = [getattr(found, field.name) for field in fields(Rates) if field.name.endswith("_s")]
    assert all(value > 0 for value in seconds if value is not found.shared_s)
    assert (found.flops > 1e6, found.on_gpu, found.shared_s > 0) == (True, False, sets_per_job > 1)
    noise = measure(settings, 2, backbone, [], fuses=False)
    assert noise.decode_s > 0
    assert noise.set_s + noise.shared_s == pytest.approx(max(noise.fused_s, noise.set_s))  # of a step of one set


def test_rates_are_kept_for_the_models_and_the_machine_that_they_were_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PART_S", 0.01)
    settings = tiny.config(["nowhere"])
    assert stored_rates(tmp_path, settings, 2) is None
    found = measure(settings, 2, build_backbone(settings.backbone), [], fuses=False)
    store_rates(tmp_path, found)
    assert stored_rates(tmp_path, settings, 2) == found
    assert stored_rates(tmp_path, tiny.config(["elsewhere"], adapt={"epochs": 9}), 2) == found
    others = ({"adapt": {"bottleneck": 5}}, {"backbone": {"image_size": 16}}, {"resources": {"cpus_per_worker": 2}})
    assert [stored_rates(tmp_path, tiny.config(["nowhere"], **other), 2) for other in others] == [None] * 3
    assert stored_rates(tmp_path, settings, 3) is None
    monkeypatch.setattr(rates, "machine_name", lambda where: "another machine")
    assert stored_rates(tmp_path, settings, 2) is None
    monkeypatch.undo()
    path = tmp_path / rates.RATES_FILE
    for damaged in (json.dumps({"decode_s": 1}), "[]", "{"):
        path.write_text(damaged)
        assert stored_rates(tmp_path, settings, 2) is None


def test_slow_passes_are_run_once_or_twice_and_fast_ones_on_several_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    clock = iter([0.0, 9.0, *(float(t) for t in range(100, 200))])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    bench = rates._Bench(torch.device("cpu"), 1)
    assert bench.seconds(asked.append, 8, part_s=2.0) == 9.0  # more than its share: the first pass counts
    assert asked == [1]
    asked.clear()
    assert bench.seconds(asked.append, 8, part_s=1.0) == 1.0
    assert asked == [1, 1]  # the first may have been slow only because it was the first
    asked.clear()
    assert bench.seconds(asked.append, 8, part_s=10.0) == 1.0 / 5
    assert asked == [1, 5, 5]


def test_no_speed_is_measured_on_zeros_or_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(rates, "_side", lambda model: 4)
    monkeypatch.setattr(rates._Bench, "seconds", lambda self, work, most, part_s=1.0: work(2) or 1.0)

    class Model(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return super().forward(images.flatten(1))

    bench = rates._Bench(torch.device("cpu"), at_once=1)
    bench.forward(Model(48, 2))  # type: ignore[arg-type]
    bench.step(Model(48, 2))  # type: ignore[arg-type]
    assert [len(images.unique()) for images in seen] == [96, 96]
