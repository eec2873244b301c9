"""galleries: features of every adaptor set -> for each task the weights of the sets, from its images alone.

A task's images are the gallery that is searched. Of the labels, only the task of an image is read.
Shapes: n images of a gallery, D channels, N adaptor sets.

Being of one class is transitive: if two images are like a third one, they are like each other. So at the granularity
at which a gallery is searched, neighbours of neighbours should be neighbours. Where features are too coarse, classes
run into each other and this fails; where they are too fine, a class falls apart into pairs and chains, and it fails as
well.

The figure has a bias: features of low intrinsic dimension score high whatever they mean, since on a curve neighbours of
neighbours are neighbours. It compares sets that were trained alike, not features of other kinds. Near-copies have the
same effect (a set that has collapsed to a few points is perfectly transitive), so they do not count as neighbours. The
effective rank logged with it shows a set that has lost dimensions; no weight depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays, Store, wait_until_seen
from grappa_dist.checksums import load_array, load_json
from grappa_dist.console import EVENTS_FILE, pluralize, read_events
from grappa_dist.data.rng import Purpose, generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import save_array, write_json
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.exclude import excluding
from grappa_dist.stages.ground_truth import TASKS_FILE, load_ground_truth, write_ground_truth
from grappa_dist.stages.run import Run

GALLERIES_FILE = "galleries.json"
NEIGHBOURS = 10
COPIES = 0.999  # cosine above which two images are near-copies
MOST_IMAGES = 20_000  # of a gallery, sampled where it has more
_BLOCK = 1024  # rows at a time
_ROUNDING = 1e-12  # variance of equal rows in float32, at most


@dataclass(frozen=True)
class GalleriesTask:
    """The input of `weigh_sets`."""

    ground_truth: Artifact
    features: Mapping[str, RowArrays]  # by adaptor set
    bad: NDArray[np.int64]
    seed: int
    copies: float  # cosine above which images are no neighbours
    artifact: Artifact


def galleries_of(
    store: Store,
    seed: int,
    copies: float,
    ground_truth: Artifact,
    features: Mapping[str, Sequence[Artifact]],
    *,
    excluded: Artifact | None = None,
) -> Artifact:
    """The artefact of the weights.

    Args:
        copies: `fuse.duplicate_cosine`.
    """
    inputs = {f"{name} shard {i}": a for name, shards in features.items() for i, a in enumerate(shards)}
    settings = {"neighbours": NEIGHBOURS, "most_images": MOST_IMAGES, "duplicate_cosine": copies, "seed": seed}
    return store.artifact("galleries", settings, {"truth": ground_truth, **inputs, **excluding(excluded)})


def weigh_galleries(
    run: Run,
    images: ImageShards,
    ground_truth: Artifact,
    features: Mapping[str, RowArrays],
    bad: NDArray[np.int64],
    artifact: Artifact,
) -> None:
    """Computes the weights of the sets for every task, and logs them before anything is evaluated with them."""
    if not artifact.complete:
        what = f"{pluralize(len(features), 'adaptor set')} on {pluralize(len(images), 'image')}"
        with run.console.stage("galleries", what):
            write_ground_truth(run, images, ground_truth, "galleries")
            config = run.config
            task = GalleriesTask(ground_truth, features, bad, config.seed, config.fuse.duplicate_cosine, artifact)
            run.runner.map(weigh_sets, [task])
            wait_until_seen([artifact])
    _log_weights(run, list(features), artifact)


def _log_weights(run: Run, sets: Sequence[str], artifact: Artifact) -> None:
    """Logs the weights that the log lacks: an earlier attempt may have ended between commit and log."""
    events = read_events(run.store.root / EVENTS_FILE)
    logged = {(e["artifact"], e["task"]) for e in events if e["name"] == "gallery"}
    for name, found in load_galleries(artifact).items():
        if (artifact.name, name) in logged:
            continue
        figures = zip(sets, found["weights"], found["transitivity"], found["effective_rank"], strict=True)
        text = ", ".join(f"{model} {weight:.2f} ({share:.3f}, {rank:.1f})" for model, weight, share, rank in figures)
        run.console.event("gallery", artifact=artifact.name, task=name, sets=list(sets), **found)
        run.console.log(f"gallery {name}: weights of the sets (transitivity, effective rank): {text}")


def weigh_sets(device: torch.device, task: GalleriesTask) -> None:
    """Writes transitivity, effective rank and weights of all sets in every task, and a copy of the tasks."""
    ground_truth, folder = load_ground_truth(task.ground_truth), task.artifact.begin()
    found = {}
    for number, name in enumerate(ground_truth.task_names):
        rows = np.setdiff1d(ground_truth.rows(number), task.bad)
        draw = generator(Purpose.GALLERY, task.seed, number)
        rows = np.sort(draw.choice(rows, MOST_IMAGES, replace=False)) if len(rows) > MOST_IMAGES else rows
        shares, ranks = [], []
        for features in task.features.values():
            z = torch.from_numpy(features.take_unit(rows)).to(device)
            shares.append(transitivity(z, copies=task.copies).cpu())
            ranks.append(round(effective_rank(z), 2))
        found[name] = {
            "images": len(rows),
            "transitivity": torch.stack(shares).mean(1).nan_to_num().tolist(),
            "effective_rank": ranks,
            "weights": set_weights(torch.stack(shares)).tolist(),
        }
    save_array(folder / TASKS_FILE, ground_truth.tasks)
    write_json(folder / GALLERIES_FILE, found)
    task.artifact.commit()


def load_galleries(artifact: Artifact) -> dict[str, dict[str, list[float]]]:
    """By task: transitivity, effective rank and weights, (N,) each; in the order of task numbers."""
    found: dict[str, dict[str, list[float]]] = load_json(artifact.path / GALLERIES_FILE)
    return found


def rows_by_gallery(spec: ModelSpec, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Tensor | None]]:
    """The rows by gallery, with the weights (N,) of the sets in it; all together and None where a model has none."""
    if spec.galleries is None:
        return [(rows, None)]
    weights = [torch.tensor(g["weights"]) for g in load_galleries(spec.galleries).values()]
    tasks = load_array(spec.galleries.path / TASKS_FILE)[rows]
    return [(rows[tasks == task], weights[task]) for task in np.unique(tasks).tolist()]


def transitivity(z: Tensor, k: int = NEIGHBOURS, copies: float = COPIES) -> Tensor:
    """For each image the share of its neighbours' k neighbours that are its own, (n,), from unit rows (n, D).

    Fewer than k + 1 images have n - 1 neighbours each; a single image has a share of zero. Images whose cosine is above
    `copies` are no neighbours; where an image has fewer than k others, the missing ones count as not shared.
    """
    k = min(k, len(z) - 1)
    if k < 1:
        return z.new_zeros(len(z))
    near = torch.cat([_nearest(z, start, k, copies) for start in range(0, len(z), _BLOCK)])  # (n, k), -1 for none
    shares = []
    for own in near.split(_BLOCK):
        theirs = near[own].masked_fill_(own.unsqueeze(2) < 0, -1).flatten(1)  # (b, k * k)
        found = (theirs.unsqueeze(2) == own.unsqueeze(1)).any(2) & (theirs >= 0)
        shares.append(found.float().mean(1))
    return torch.cat(shares)


def _nearest(z: Tensor, start: int, k: int, copies: float) -> Tensor:
    """The k nearest other rows of a block of b rows, near-copies left out, (b, k); -1 where there are fewer."""
    scores = z[start : start + _BLOCK] @ z.T
    own = torch.arange(len(scores), device=z.device)
    scores.masked_fill_(scores > copies, -torch.inf)
    scores[own, own + start] = -torch.inf
    best = scores.topk(k, 1)
    return best.indices.masked_fill(best.values.isinf(), -1)


def effective_rank(z: Tensor) -> float:
    """Dimensions that the variance of unit rows (n, D) is spread over: exp of the entropy of its shares, or 0."""
    if len(z) < 2:
        return 0.0
    centred = (z - z.mean(0)).double()
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    if float(variances.sum()) <= _ROUNDING * len(z):
        return 0.0
    return float(torch.special.entr(variances / variances.sum()).sum().exp())


def set_weights(shares: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Weights (N,) that sum to one, from the transitivity of every set, (N, n).

    A set weighs exp(-z^2 / 2), z being how many standard errors it falls short of the best one, image by image. So a
    gallery in which the sets do not differ gives equal weights, and a large one in which they do selects the best.
    Neighbourhoods overlap: n images count as n / k.
    """
    num_sets, images = shares.shape
    if images == 0:
        return torch.full((num_sets,), 1 / num_sets)
    means = shares.double().mean(1)
    behind = shares[means.argmax()].double() - shares.double()  # (N, n)
    error = behind.std(1, correction=0) * (k / images) ** 0.5
    z = behind.mean(1) / error.clamp_min(1e-12)
    weights = torch.exp(-z.square() / 2)
    return (weights / weights.sum()).float()
