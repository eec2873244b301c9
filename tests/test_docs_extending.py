"""The examples of docs/extending.md, run as they stand there. That of a backbone is run in models/test_backbone.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import RowArrays
from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import join_rows
from grappa_dist.kmeans.methods import Choice, ClusteringTask
from grappa_dist.training.loop import Schedule, train
from tests.kmeans.test_lloyd import clustered, part_of
from tests.processes import run_ranks
from tests.stages import tiny
from tests.structure import ROOT
from tests.test_docs import section
from tests.training.test_loop import Regression

STEPS, CLUSTERS = 40, 12
CPU = torch.device("cpu")


def example(heading: str) -> ModuleType:
    """The code below a heading of the page, as a module."""
    code = section((ROOT / "docs" / "extending.md").read_text(), heading).split("```python\n")[1].split("```")[0]
    module = ModuleType(f"example_{heading.replace(' ', '_').lower()}")
    sys.modules[module.__name__] = module  # where dataclasses look up their types
    exec(compile(code, f"docs/extending.md, {heading}", "exec"), module.__dict__)
    return module


def train_by_lion(comm: Comm, folder: Path) -> list[tuple[bool, list[torch.Tensor], list[float]]]:
    """Of a training, one that is stopped, and its resumption: whether it ended, the parameters, the losses so far."""
    found = []
    for name, stop_after in (("at once", None), ("stopped", 15), ("stopped", None)):
        objective = Regression(comm)
        learning = [p for p in objective.module.parameters() if p.requires_grad]
        optimizer = example("An optimizer").Lion(learning, lr=0.0, weight_decay=1e-3)
        context, schedule = tiny.Watcher(stop_after=stop_after).context(comm), Schedule(STEPS, 10, lambda step: 0.05)
        ended = train(context, objective, optimizer, schedule, folder=folder / name, job="lion")
        found.append((ended, [p.detach() for p in learning], tiny.losses_of(folder / name)))
    return found


def test_the_optimizer_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    ((at_once, stopped, resumed),) = run_ranks(train_by_lion, 1, tmp_path)
    assert (at_once[0], stopped[0], resumed[0]) == (True, False, True)
    assert np.mean(at_once[2][-10:]) < np.mean(at_once[2][:10])
    assert resumed[2] == at_once[2]
    assert all(torch.equal(a, b) for a, b in zip(resumed[1], at_once[1], strict=True))


def train_alignment(comm: Comm, folder: Path) -> list[float]:
    objective = example("A loss").Alignment(comm, pairs=5)
    optimizer = torch.optim.SGD(objective.module.parameters(), lr=0.0)
    schedule = Schedule(STEPS, STEPS, lambda step: 0.5)
    assert train(tiny.Watcher().context(comm), objective, optimizer, schedule, folder=folder, job="alignment")
    return tiny.losses_of(folder)


@pytest.mark.slow
def test_the_loss_falls_and_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    losses = {size: run_ranks(train_alignment, size, tmp_path / str(size))[0] for size in (1, 2)}
    assert np.mean(losses[1][-5:]) < 0.5 * np.mean(losses[1][:5])
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)


def cluster_from_a_sample(comm: Comm, x: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, np.ndarray, list[float]]:
    sharded = join_rows(comm, part_of(x, cuts[comm.rank], cuts[comm.rank + 1]), device=CPU)
    choice = Choice("sampled-start", "exact", "a test")  # type: ignore[arg-type]
    task = ClusteringTask(CLUSTERS, ClusteringConfig(iterations=5, sample_rows_per_cluster=6), choice)
    result = example("A clustering method").WithSampledStart(sharded, task, 3, 0, {}).cluster().result
    return result.centroids, np.concatenate(result.labels), result.inertia


@pytest.mark.slow
def test_the_clustering_method_gives_the_same_bits_on_any_number_of_ranks() -> None:
    x = clustered(300, 8, 20)
    ((centroids, labels, inertia),) = run_ranks(cluster_from_a_sample, 1, x, [0, 300])
    assert set(labels.tolist()) == {-1, *range(CLUSTERS)}  # -1: bad rows
    assert inertia == sorted(inertia, reverse=True)
    found = run_ranks(cluster_from_a_sample, 2, x, [0, 170, 300])
    np.testing.assert_array_equal(np.concatenate([part for _, part, _ in found]), labels)
    np.testing.assert_array_equal(found[0][0], centroids)
    np.testing.assert_array_equal(found[1][0], centroids)


def test_the_stage_counts_once_what_the_labels_have(tmp_path: Path) -> None:
    stage, here = example("A stage"), tiny.Here()
    run = tiny.run_in(tiny.config(["nowhere"]), tmp_path, here)
    files = [str(tmp_path / f"rows-{shard}.npy") for shard in range(2)]
    for file, labels in zip(files, ([0, 2, -1, 2], [2, 1]), strict=True):
        np.save(file, np.array(labels, np.int32))
    sizes = {4: stage.sizes_of(run.store, run.store.artifact("labels/k=4", {}, {}))}
    for _ in range(2):
        stage.cluster_sizes(run, sizes, {4: RowArrays(tuple(files), (0, 4, 6))})
    assert json.loads((sizes[4].path / "sizes.json").read_text()) == [1, 1, 3, 0]
    assert here.asked == ["count_rows"]


def test_every_kind_of_extension_has_an_example_and_the_files_it_touches() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    for heading in ("A backbone", "An optimizer", "A loss", "A clustering method", "A stage"):
        assert "```python\n" in section(page, heading)
        assert heading == "A backbone" or "| file | change |" in section(page, heading)
