from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import norm_softmax, norm_softmax_loss
from grappa_dist.training.checkpoints import load_checkpoint, save_checkpoint
from grappa_dist.training.classifier import Classifier, ClassifierSettings
from tests.processes import run_ranks
from tests.stages.tiny import CPU, Watcher

DIM, STEPS, RATE, GAMMA, DECAY = 6, 4, 0.05, 16.0, 1e-2
SHARES = {1: (9,), 2: (7, 2), 3: (4, 0, 5)}  # images of each rank
CLASSES = (1, 2, 5, 200)  # fewer than ranks; not divisible; several chunks of 64
SAMPLED = 0.3


def batch(step: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features of any length and labels, with both ends of every shard and chunk among them, and some twice."""
    draws = torch.Generator().manual_seed(step)
    labels = torch.randint(classes, (9,), generator=draws)
    labels[:6] = torch.tensor([0, 63, 64, classes // 2, classes - 1, classes - 1]) % classes
    return 3 * torch.randn(9, DIM, generator=draws), labels


def fresh(comm: Comm, classes: int, sampled: float = 1.0, decay: float = DECAY) -> Classifier:
    classifier = Classifier(comm, CPU, (classes, DIM), ClassifierSettings(GAMMA, decay, sampled, seed=3))
    classifier.start(None, torch.Generator().manual_seed(0))
    return classifier


def one_step(classifier: Classifier, comm: Comm, step: int, parts: int = 1) -> list[Tensor]:
    """Loss, number right and gradients of this rank's images, which come in `parts` micro-batches."""
    whole_z, labels = batch(step, classifier.num_rows)
    z = whole_z.split(list(SHARES[comm.size]))[comm.rank].requires_grad_()
    classifier.begin(step, labels)
    of_ranks = [share.tensor_split(parts) for share in labels.split(list(SHARES[comm.size]))]
    scores = []
    for mine, *others in zip(z.tensor_split(parts), *of_ranks, strict=True):
        scores.append(classifier.score(mine, torch.cat(others), [len(of_rank) for of_rank in others]))
    total = torch.stack([loss for loss, _ in scores]).sum()
    gradient = torch.autograd.grad(total, z)[0]
    classifier.step(RATE)
    return [total.detach(), torch.stack([correct for _, correct in scores]).sum(), gradient]


def whole(comm: Comm, rows: Tensor) -> Tensor:
    return torch.cat(comm.gather(rows))


def every_way(comm: Comm, folder: Path) -> dict[str, Any]:
    norm_softmax_loss._CPU_CHUNK_BYTES = 1  # chunks of the least size, 64 classes
    found: dict[str, Any] = {}
    for classes in CLASSES:
        for sampled in (1.0, SAMPLED):
            classifier = fresh(comm, classes, sampled)
            start = whole(comm, classifier.state.rows)
            steps = [one_step(classifier, comm, step) for step in range(STEPS)]
            state = {name: whole(comm, t) for name, t in classifier.state.tensors().items()}
            found[f"{classes} {sampled}"] = (start, steps, state)
    parted = fresh(comm, 200, SAMPLED)
    found["parts"] = [one_step(parted, comm, step, parts=3) for step in range(STEPS)], whole(comm, parted.state.rows)
    saved, nothing = fresh(comm, 200), nn.Linear(1, 1)
    one_step(saved, comm, 0)
    optimizer = torch.optim.Adam(nothing.parameters())
    save_checkpoint(
        Watcher().context(comm), folder / str(comm.size), 1, nothing, optimizer.state, {"classifier": saved.shard()}
    )
    found["saved"] = {name: whole(comm, t) for name, t in saved.state.tensors().items()}
    return found


def loaded(comm: Comm, folder: Path) -> dict[int, dict[str, Tensor]]:
    """What other numbers of ranks saved, read by these."""
    found, nothing = {}, nn.Linear(1, 1)
    for size in SHARES:
        classifier = fresh(comm, 200)
        optimizer = torch.optim.Adam(nothing.parameters())
        shards = {"classifier": classifier.shard()}
        assert load_checkpoint(Watcher().context(comm), folder / str(size), nothing, optimizer, shards) == 1
        found[size] = {name: whole(comm, t) for name, t in classifier.state.tensors().items()}
    return found


Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(scope="module")
def world(folder: Path) -> Found:
    return {size: run_ranks(every_way, size, folder) for size in SHARES}


def dense(weight: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Loss, number right and gradients of the images, and the classes in the end: materialised, by torch's Adam."""
    classes = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([classes], lr=RATE, weight_decay=DECAY)
    steps = []
    for step in range(STEPS):
        z, labels = batch(step, len(weight))
        z.requires_grad_()
        logits = GAMMA * F.normalize(z, dim=1) @ F.normalize(classes, dim=1).T
        loss = F.cross_entropy(logits, labels, reduction="sum")
        optimizer.zero_grad()
        (loss / len(z)).backward()
        optimizer.step()
        steps.append((loss.detach(), (logits.argmax(1) == labels).sum(), z.grad * len(z)))  # type: ignore[operator]
    return steps, classes.detach()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("size", SHARES)
def test_any_ranks_have_loss_gradients_and_steps_of_the_dense_softmax(world: Found, size: int, classes: int) -> None:
    ranks = [rank[f"{classes} 1.0"] for rank in world[size]]
    expected, end = dense(ranks[0][0])
    for t, (loss, correct, gradient) in enumerate(expected):
        parts = [steps[t] for _, steps, _ in ranks]
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).sum(), loss, rtol=1e-5, atol=1e-5)
        assert sum(int(p[1]) for p in parts) == int(correct)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), gradient, rtol=1e-4, atol=2e-5)
    for _, _, state in ranks:
        torch.testing.assert_close(state["rows"], end, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("classes", CLASSES)
def test_on_one_rank_loss_and_gradient_are_those_of_norm_softmax_to_the_bit(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_softmax_loss, "_CPU_CHUNK_BYTES", 1)
    classifier = fresh(Comm(), classes)
    z, labels = batch(0, classes)
    z.requires_grad_()
    classifier.begin(0, labels)
    loss, _ = classifier.score(z, labels, [len(z)])
    mean = norm_softmax(z, classifier.state.rows, labels, GAMMA)
    assert torch.equal(loss / len(z), mean)
    assert torch.equal(torch.autograd.grad(loss / len(z), z)[0], torch.autograd.grad(mean, z)[0])


def sparse(weight: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Losses, classes in the end and how often each took part: every row has its own Adam, called when drawn."""
    rows = [nn.Parameter(row.clone()) for row in weight]
    adams = [torch.optim.Adam([row], lr=RATE, weight_decay=DECAY) for row in rows]
    times, losses = torch.zeros(len(rows), dtype=torch.int32), []
    for step in range(STEPS):
        z, labels = batch(step, len(rows))
        classifier = fresh(Comm(), len(rows), SAMPLED)
        classifier.begin(step, labels)
        assert classifier._active is not None
        active = classifier._active.tolist()
        assert set(labels.tolist()) <= set(active)
        times[active] += 1
        logits = GAMMA * F.normalize(z, dim=1) @ F.normalize(torch.stack([rows[a] for a in active]), dim=1).T
        places = torch.tensor([active.index(label) for label in labels.tolist()])
        loss = F.cross_entropy(logits, places, reduction="sum")
        losses.append(loss.detach())
        for adam in adams:
            adam.zero_grad()
        (loss / len(z)).backward()
        for a in active:
            adams[a].step()
    return losses, torch.stack([row.detach() for row in rows]), times


@pytest.mark.parametrize("size", SHARES)
def test_sampled_classes_are_the_same_on_any_ranks_and_others_stand_still(world: Found, size: int) -> None:
    ranks = [rank[f"200 {SAMPLED}"] for rank in world[size]]
    losses, end, times = sparse(ranks[0][0])
    for t, loss in enumerate(losses):
        found = torch.stack([steps[t][0] for _, steps, _ in ranks]).sum()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    for start, _, state in ranks:
        assert torch.equal(state["steps"], times)
        torch.testing.assert_close(state["rows"], end, rtol=1e-4, atol=2e-5)
        assert 0 < int((times == 0).sum()) < 200
        assert torch.equal(state["rows"][times == 0], start[times == 0])
        assert not state["mean"][times == 0].any()


@pytest.mark.parametrize("size", SHARES)
def test_micro_batches_of_a_step_are_the_step_at_once(world: Found, size: int) -> None:
    for rank in world[size]:
        steps, rows = rank["parts"]
        _, expected, state = rank[f"200 {SAMPLED}"]
        for found, at_once in zip(steps, expected, strict=True):
            torch.testing.assert_close(found, at_once, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows, state["rows"], rtol=1e-4, atol=1e-5)


def test_the_start_and_the_samples_differ_by_step_but_not_by_ranks(world: Found) -> None:
    for classes in CLASSES:
        starts = [rank[f"{classes} 1.0"][0] for ranks in world.values() for rank in ranks]
        assert all(torch.equal(start, starts[0]) for start in starts)
    draws = torch.Generator().manual_seed(0)
    expected = F.normalize(torch.randn(5000, 3, generator=draws), dim=1)  # more than are drawn at a time
    for rank in range(3):
        classifier = Classifier(Comm(rank, 3), CPU, (5000, 3), ClassifierSettings(GAMMA, 0.0))
        classifier.start(None, torch.Generator().manual_seed(0))
        assert torch.equal(classifier.state.rows, expected[classifier.first : classifier.end])
    classifier = fresh(Comm(), 2000, 0.1)
    drawn = [classifier._drawn(step) for step in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert all(150 < int(d.sum()) < 250 for d in drawn)


@pytest.mark.parametrize("size", SHARES)
def test_a_checkpoint_loads_on_any_number_of_ranks_to_the_bit(folder: Path, world: Found, size: int) -> None:
    for found in run_ranks(loaded, size, folder):
        for saved_on, state in found.items():
            expected = world[saved_on][0]["saved"]
            assert state.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_centroids_of_another_partition_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "centroids.npy", np.ones((4, DIM), dtype=np.float32))
    classifier = Classifier(Comm(), CPU, (5, DIM), ClassifierSettings(GAMMA, 0.0))
    with pytest.raises(ValueError, match=r"centroids.npy has shape \(4, 6\), must be \(5, 6\)"):
        classifier.start(tmp_path / "centroids.npy", torch.Generator())
