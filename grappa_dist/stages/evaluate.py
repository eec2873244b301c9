"""evaluate: features of every model -> retrieval scores per task, and what can be said without labels.

Shapes: n rows, D channels, L layers, N adaptor sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, RowArrays, Store, write_json
from grappa_dist.config import EvaluateConfig
from grappa_dist.data.loader import load_images
from grappa_dist.data.randomness import generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import view_generator
from grappa_dist.models import Grappa
from grappa_dist.ops.metrics import retrieval_scores
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.modelling import ModelSpec, built, pixels_of, preprocess_of
from grappa_dist.stages.run import Run

TRUTH_TASKS, TRUTH_LABELS, TRUTH_NAMES = "tasks.npy", "labels.npy", "names.json"
SCORES_FILE, INSIGHT_FILE = "scores.json", "insight.json"
BATCH = 64  # images at a time where a model is looked at


@dataclass(frozen=True)
class Evaluation:
    """The artefacts of one evaluation."""

    truth: Artifact
    features: Mapping[str, RowArrays]  # by model name
    scores: Mapping[str, Artifact]
    insights: Mapping[str, Artifact]


@dataclass(frozen=True)
class Truth:
    """Task and label of every row, for evaluation only; label -1: none."""

    tasks: NDArray[np.int64]
    labels: NDArray[np.int64]
    task_names: list[str]
    label_names: list[str]

    def rows(self, task: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.tasks == task)


def truth_of(store: Store, images: ImageShards, *, labelled: bool) -> Artifact:
    return store.artifact("truth", {"labelled": labelled}, {"images": images.fingerprint})


def scores_of(store: Store, truth: Artifact, model: str, features: Sequence[Artifact]) -> Artifact:
    return store.artifact(f"scores/{model}", {}, {"truth": truth, **{f"shard {i}": a for i, a in enumerate(features)}})


def insight_of(
    store: Store, truth: Artifact, model: str, settings: EvaluateConfig, seed: int, features: Sequence[Artifact]
) -> Artifact:
    inputs = {"truth": truth, **{f"shard {i}": a for i, a in enumerate(features)}}
    return store.artifact(f"insight/{model}", {**settings.model_dump(exclude={"export"}), "seed": seed}, inputs)


def evaluate(
    run: Run, images: ImageShards, bad: NDArray[np.int64], specs: Mapping[str, ModelSpec], evaluation: Evaluation
) -> None:
    """Reads the labels, scores every model on every task, and looks at every model; each once."""
    truth, config = evaluation.truth, run.config
    labelled = bool(truth.settings["labelled"])
    scores = [m for m, a in evaluation.scores.items() if not a.complete]
    insights = [m for m, a in evaluation.insights.items() if not a.complete]
    if not (scores or insights):
        return
    with run.console.stage("evaluate", f"{len(specs)} models on {len(images)} images"):
        if not truth.complete:
            run.runner.map(read_truth, [(images, truth, labelled)], lambda _: None)
        run.runner.map(
            score_model,
            [(evaluation.features[m], bad, truth, evaluation.scores[m]) for m in scores],
            lambda count: run.console.say(f"evaluate: {count}/{len(scores)} models scored"),
        )
        run.runner.map(
            look_at_model,
            [
                (images, bad, specs[m], evaluation.features[m], truth, evaluation.insights[m], (config.evaluate, config.seed))
                for m in insights
            ],
            lambda count: run.console.say(f"evaluate: {count}/{len(insights)} models looked at without labels"),
        )


def read_truth(device: torch.device, threads: int, images: ImageShards, artifact: Artifact, labelled: bool) -> None:
    """Collects the JSON members: the only place that reads them."""
    folder = artifact.begin()
    tasks, labels = np.zeros(len(images), np.int64), np.full(len(images), -1, np.int64)
    task_ids: dict[str, int] = {}
    label_ids: dict[tuple[str, str], int] = {}
    for row in range(len(images)):
        member = (images.labels(row) if labelled else None) or {}
        task = str(member.get("task") or "all")
        tasks[row] = task_ids.setdefault(task, len(task_ids))
        if member.get("label") is not None:
            labels[row] = label_ids.setdefault((task, str(member["label"])), len(label_ids))
    np.save(folder / TRUTH_TASKS, tasks)
    np.save(folder / TRUTH_LABELS, labels)
    write_json(folder / TRUTH_NAMES, {"tasks": list(task_ids), "labels": [label for _, label in label_ids]})
    artifact.commit()


def load_truth(artifact: Artifact) -> Truth:
    names = json.loads((artifact.path / TRUTH_NAMES).read_text())
    tasks, labels = (np.load(artifact.path / f, allow_pickle=False) for f in (TRUTH_TASKS, TRUTH_LABELS))
    return Truth(tasks, labels, names["tasks"], names["labels"])


def score_model(
    device: torch.device, threads: int, features: RowArrays, bad: NDArray[np.int64], truth: Artifact, artifact: Artifact
) -> None:
    """Leave-one-out retrieval on every labelled task; rows that do not decode are neither query nor gallery."""
    folder, known = artifact.begin(), load_truth(truth)
    labels = known.labels.copy()
    labels[bad] = -1
    scores = []
    for task, name in enumerate(known.task_names):
        rows = known.rows(task)
        rows = rows[labels[rows] >= 0]
        if len(rows):
            z = torch.from_numpy(features.take(rows))
            scores.append({"task": name, **retrieval_scores(z, torch.from_numpy(labels[rows]))})
    write_json(folder / SCORES_FILE, [s for s in scores if s["queries"]])
    artifact.commit()


@torch.inference_mode()
def look_at_model(
    device: torch.device,
    threads: int,
    images: ImageShards,
    bad: NDArray[np.int64],
    spec: ModelSpec,
    features: RowArrays,
    truth: Artifact,
    artifact: Artifact,
    how: tuple[EvaluateConfig, int],
) -> None:
    """What needs no label: does an augmented view find its source, which images are near, how are the sets weighed."""
    settings, seed = how
    known, folder = load_truth(truth), artifact.begin()
    good = np.setdiff1d(np.arange(len(images)), bad)
    model = built(spec, device)
    insight: dict[str, Any] = _views_find_sources(model, images, features, good, settings, seed, device)
    insight["galleries"] = _galleries(features, known, good, settings, seed)
    if isinstance(model, Grappa) and spec.fusion is not None:
        insight |= _attention(model, images, known, good, settings, seed, device)
    write_json(folder / INSIGHT_FILE, insight)
    artifact.commit()


def _sample(rows: NDArray[np.int64], count: int, seed: int, *purpose: int) -> NDArray[np.int64]:
    """Some of the rows, sorted: the same for every model."""
    draw = generator("evaluation sample", seed, *purpose)
    return np.sort(draw.choice(rows, min(count, len(rows)), replace=False)) if len(rows) else rows


def _views_find_sources(
    model: torch.nn.Module,
    images: ImageShards,
    features: RowArrays,
    good: NDArray[np.int64],
    settings: EvaluateConfig,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    preprocess = preprocess_of(pixels_of(model))
    side = preprocess.image_size
    rows = _sample(good, settings.view_queries, seed)
    gallery = _sample(good, max(20_000, len(rows)), seed)  # bounded; smaller collections are searched whole
    gallery = np.union1d(gallery, rows)
    base = torch.from_numpy(features.take(gallery)).to(device)
    found = 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pixels = load_images(
            images, part, lambda image, row: preprocess.augment(image, view_generator(seed, 0, row, 2), 0.25), (side, side, 3)
        )
        z = model(to_images(pixels, device)).float()
        nearest = gallery[(z @ base.T).argmax(1).cpu().numpy()]
        found += int((nearest == part).sum())
    return {"view_finds_source": found / max(1, len(rows)), "view_queries": len(rows)}


def _galleries(
    features: RowArrays, known: Truth, good: NDArray[np.int64], settings: EvaluateConfig, seed: int
) -> list[dict[str, Any]]:
    """Some queries of every task and their nearest rows of the task, as row ids."""
    galleries = []
    for task in range(len(known.task_names)):
        rows = np.intersect1d(known.rows(task), good)
        queries = _sample(rows, settings.gallery_queries, seed, task)
        base = features.take(rows)
        for query in queries.tolist():
            scores = base @ features.take(np.array([query]))[0]
            scores[rows == query] = -np.inf
            order = np.argsort(-scores, kind="stable")[: min(settings.gallery_hits, len(rows) - 1)]
            hits = [{"row": int(rows[i]), "score": float(scores[i])} for i in order]
            galleries.append({"task": task, "query": query, "hits": hits})
    return galleries


def _attention(
    model: Grappa,
    images: ImageShards,
    known: Truth,
    good: NDArray[np.int64],
    settings: EvaluateConfig,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Mean attention per task, (L, N) each, over a sample of images; mean entropy as a share of log N, (L,)."""
    preprocess = preprocess_of(model.backbone.pixels)
    side = preprocess.image_size
    attention: dict[str, list[list[float]]] = {}
    entropies = []
    for task, name in enumerate(known.task_names):
        rows = _sample(np.intersect1d(known.rows(task), good), max(BATCH, settings.view_queries // 4), seed, task, 1)
        parts = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            pixels = load_images(images, part, lambda image, _: preprocess.test(image), (side, side, 3))
            model(to_images(pixels, device))
            parts.append(model.last_attention().double().cpu())
        if parts:
            alpha = torch.cat(parts)  # (n, L, N)
            attention[name] = alpha.mean(0).tolist()
            entropies.append(-(alpha * alpha.clamp_min(1e-30).log()).sum(-1))
    sets = model.layers[0].adaptors.num_sets
    entropy = torch.cat(entropies).mean(0) / np.log(sets) if sets > 1 and entropies else torch.ones(len(model.layers))
    return {"attention": attention, "entropy": entropy.tolist()}
