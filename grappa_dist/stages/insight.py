"""insight: label-free figures of a model, on samples of images that are the same for every model.

How often an augmented view finds its source, which images are near, and the weights of the sets. Every image of a
sample is decoded once, by one rank, which keeps its pixels and computes its features by one model after the other.
Batches are whole on a rank, so figures do not depend on how many there are.

Shapes: n rows, D channels, L layers, N adaptor sets, S pixels a side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grappa_dist.artifacts import RowArrays
from grappa_dist.config import Config
from grappa_dist.data.decoding import Picture, Pixels
from grappa_dist.data.device_batches import Memory, device_batches
from grappa_dist.data.loader import Make, load_images, read_batches
from grappa_dist.data.rng import Purpose, generator, view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.collectives import wire_device
from grappa_dist.distributed.sharded_rows import scratch
from grappa_dist.distributed.worker import RankContext, wait_for_slower_ranks
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ModelSpec, cached_model, preprocess_of
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.gallery_weights import rows_by_gallery
from grappa_dist.stages.ground_truth import GroundTruth

BATCH = 64  # images at a time through a model
GALLERY_ROWS = 20_000  # images that views and gallery queries are searched among, at most
ATTENTION_IMAGES = 128  # per task
NEIGHBOURS = 5  # of each image, counted by shared task and shared label
VIEW, VIEW_CROP_AREA = 2, 0.25  # training uses views 0 and 1
Ids = NDArray[np.int64]


def spread_over_classes(labels: Ids, count: int) -> Ids:
    """The first images of every class, then the second ones, and so on: `count` places in the labels (n,).

    Images that are alone in their class or have no label (-1), for which nothing right can be found, come last.
    """
    sizes, seen, turns = Counter(labels.tolist()), Counter[int](), list[tuple[bool, int]]()
    for label in labels.tolist():
        turns.append((label < 0 or sizes[label] == 1, seen[label]))
        seen[label] += 1
    return np.array(sorted(range(len(turns)), key=lambda place: turns[place])[:count], dtype=np.int64)


@dataclass(frozen=True)
class InsightImages:
    """The images of all models, and what is known of them."""

    images: ImageShards
    ground_truth: GroundTruth
    bad: Ids
    config: Config

    @cached_property
    def good(self) -> Ids:
        return np.setdiff1d(np.arange(len(self.images)), self.bad)

    @cached_property
    def views(self) -> Ids:
        """Rows whose augmented view is searched for its source."""
        return self.sample(self.good, self.config.evaluate.view_queries)

    @cached_property
    def attended(self) -> list[Ids]:
        """By task, rows whose weights of the sets are averaged."""
        return [self.sample(self.of_task(task), ATTENTION_IMAGES, task, 1) for task in self.tasks]

    @property
    def tasks(self) -> range:
        return range(len(self.ground_truth.task_names))

    def of_task(self, task: int) -> Ids:
        return np.intersect1d(self.ground_truth.rows(task), self.good)

    def sample(self, rows: Ids, count: int, *purpose: int) -> Ids:
        """Some of the rows, sorted: the same for every model."""
        draw = generator(Purpose.EVALUATION_SAMPLE, self.config.seed, *purpose)
        return np.sort(draw.choice(rows, min(count, len(rows)), replace=False)) if len(rows) else rows

    def gallery_queries(self, rows: Ids, task: int) -> Ids:
        """Some of a task's rows, sorted; of as many classes as possible where they have labels."""
        labels, count = self.ground_truth.labels[rows], self.config.evaluate.gallery_queries
        if not (labels >= 0).any():
            return self.sample(rows, count, task)
        order = generator(Purpose.EVALUATION_SAMPLE, self.config.seed, task).permutation(len(rows))
        return np.sort(rows[order[spread_over_classes(labels[order], count)]])


@dataclass(frozen=True)
class _Decoded:
    """Pixels of some rows, ascending, in a file that goes with the process."""

    rows: Ids  # (n,)
    pixels: Pixels  # (n, S, S, 3)

    def take(self, rows: Ids) -> Pixels:
        taken: Pixels = self.pixels[np.searchsorted(self.rows, rows)]
        return taken


class Insight:
    """The figures of one model after the other, on one of the ranks; all ranks call the same together."""

    def __init__(self, context: RankContext, given: InsightImages) -> None:
        self._context, self._given = context, given
        self._decoded: dict[str, _Decoded] = {}
        self._preprocess: Preprocess | None = None  # that the pixels are of

    @torch.inference_mode()
    def figures(self, spec: ModelSpec, features: RowArrays) -> dict[str, Any]:
        """The figures, on every rank.

        Raises:
            Stopped: on all ranks, when any was asked to stop.
        """
        found = {**self._views_find_sources(spec, features), **self._neighbours_agree(features)}
        found["galleries"] = self._galleries(features)
        return {**found, **(self._attention(spec) if spec.weights_vary else {})}

    def _views_find_sources(self, spec: ModelSpec, features: RowArrays) -> dict[str, Any]:
        """The share of augmented views whose nearest image is their source, among at most GALLERY_ROWS images."""
        given, device = self._given, self._context.device
        gallery = np.union1d(given.sample(given.good, GALLERY_ROWS), given.views)
        base = torch.from_numpy(features.take_unit(gallery)).to(device)
        found = 0

        def searched() -> Generator[None, None, None]:
            nonlocal found
            for part, z in self._features(spec, "views", [given.views]):
                found += int((gallery[(z @ base.T).argmax(1).cpu().numpy()] == part).sum())
                yield

        wait_for_slower_ranks(self._context, searched())
        (all_found,) = self._sum(found)
        return {"view_finds_source": all_found / max(1, len(given.views)), "view_queries": len(given.views)}

    def _neighbours_agree(self, features: RowArrays) -> dict[str, Any]:
        """How often the nearest of at most GALLERY_ROWS rows share task and label; nothing without labels."""
        given, comm, known = self._given, self._context.comm, self._given.ground_truth
        rows = given.sample(given.good, GALLERY_ROWS)
        labels, tasks = known.labels[rows], known.tasks[rows]
        if not (labels >= 0).any():
            return {}
        own = np.arange(len(rows) * comm.rank // comm.size, len(rows) * (comm.rank + 1) // comm.size)
        near, _ = sharded_knn(comm, features.take_unit(rows[own]), own, NEIGHBOURS, device=self._context.device)
        valid = near >= 0
        labelled = valid & (labels[own] >= 0)[:, None]
        same_task = valid & (tasks[near] == tasks[own, None])
        same_label = labelled & (labels[near] == labels[own, None])
        counts = self._sum(*(int(some.sum()) for some in (same_task, valid, same_label, labelled)))
        return {
            "neighbours_share_task": counts[0] / max(1, counts[1]),
            "neighbours_share_label": counts[2] / max(1, counts[3]),
            "neighbour_queries": len(rows),
        }

    def _galleries(self, features: RowArrays) -> list[dict[str, Any]]:
        """Some queries of every task and their nearest of at most GALLERY_ROWS rows of the task, as row ids."""
        comm, own = self._context.comm, list[dict[str, Any]]()
        for task in self._given.tasks:
            if task % comm.size == comm.rank:
                own += self._gallery_of(task, features)
        found = [gallery for part in self._gathered(own) for gallery in part]
        return sorted(found, key=lambda gallery: gallery["task"])  # stable: queries stay in order

    def _gallery_of(self, task: int, features: RowArrays) -> Iterator[dict[str, Any]]:
        given = self._given
        rows = given.sample(given.of_task(task), GALLERY_ROWS, task, 2)
        queries = given.gallery_queries(rows, task)
        z = features.take(rows) if len(queries) else None
        for query in queries.tolist():
            scores: NDArray[np.float32] = z @ features.take(np.array([query]))[0]
            scores[rows == query] = -np.inf
            order = np.argsort(-scores, kind="stable")[: min(given.config.evaluate.gallery_hits, len(rows) - 1)]
            hits = [{"row": int(rows[i]), "score": float(scores[i])} for i in order]
            yield {"task": task, "query": query, "hits": hits}

    def _attention(self, spec: ModelSpec) -> dict[str, Any]:
        """Mean attention per task, (L, N) each, over a sample; mean entropy as a share of log N, (L,)."""
        model = cached_model(spec, self._context.device)
        assert isinstance(model, Grappa)
        parts = list[tuple[Ids, Tensor]]()

        def attended() -> Generator[None, None, None]:
            for part, _ in self._features(spec, "attended", self._given.attended):
                parts.append((part, model.last_attention().double().cpu()))
                yield

        wait_for_slower_ranks(self._context, attended())
        layers, sets = model.layers, model.layers[0].adaptors.num_sets
        rows = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in parts)])
        weights = torch.cat([torch.zeros(0, len(layers), sets, dtype=torch.float64), *(a for _, a in parts)])
        wire = wire_device(self._context.comm)
        all_rows = torch.cat(self._context.comm.gather(torch.from_numpy(rows).to(wire))).cpu().numpy()
        alpha = torch.cat(self._context.comm.gather(weights.to(wire))).cpu()[torch.from_numpy(np.argsort(all_rows))]
        means, entropies, known = dict[str, Any](), [], np.sort(all_rows)
        for name, of_task in zip(self._given.ground_truth.task_names, self._given.attended, strict=True):
            if len(of_task):
                some = alpha[torch.from_numpy(np.searchsorted(known, of_task))]  # (n, L, N)
                means[name] = some.mean(0).tolist()
                entropies.append(-(some * some.clamp_min(1e-30).log()).sum(-1))
        entropy = torch.cat(entropies).mean(0) / np.log(sets) if sets > 1 and entropies else torch.ones(len(layers))
        return {"attention": means, "entropy": entropy.tolist()}

    def _features(self, spec: ModelSpec, what: str, parts: Sequence[Ids]) -> Iterator[tuple[Ids, Tensor]]:
        """This rank's rows and their features z (b, D), by batches.

        Args:
            what: views, or attended, whose pixels are not augmented.
            parts: rows of which no two are in one batch, ascending.
        """
        model, device = cached_model(spec, self._context.device), self._context.device
        own = self._own_batches(parts)
        decoded = self._pixels(what, own, model)
        batches = [(some, weights) for batch in own for some, weights in rows_by_gallery(spec, batch)]

        def read(job: tuple[Ids, Tensor | None], memory: Memory) -> None:
            pixels = decoded.take(job[0])
            memory(pixels.shape)[...] = pixels

        with closing(device_batches(batches, read, device, threads=1)) as images:
            for (some, weights), (pixels, _) in zip(batches, images, strict=True):
                if weights is not None:
                    assert isinstance(model, Grappa)
                    model.weigh(weights)
                yield some, model(to_images(pixels, device)).float()

    def _own_batches(self, parts: Sequence[Ids]) -> list[Ids]:
        comm = self._context.comm
        batches = [rows[start : start + BATCH] for rows in parts for start in range(0, len(rows), BATCH)]
        return batches[comm.rank :: comm.size]

    def _pixels(self, what: str, batches: Sequence[Ids], model: nn.Module) -> _Decoded:
        """Of all rows of the batches; decoded when they are first asked for."""
        preprocess = preprocess_of(model)
        if self._preprocess != preprocess:  # the models of a run have one backbone
            self._preprocess, self._decoded = preprocess, {}
        if what not in self._decoded:
            rows = np.sort(np.concatenate([np.zeros(0, np.int64), *batches]))
            self._decoded[what] = self._decode(rows, self._augmented if what == "views" else self._plain)
        return self._decoded[what]

    def _decode(self, rows: Ids, make: Make) -> _Decoded:
        assert self._preprocess is not None
        side = self._preprocess.image_size
        pixels: Pixels = scratch((len(rows), side, side, 3), torch.uint8).numpy()
        parts = [range(start, min(start + BATCH, len(rows))) for start in range(0, len(rows), BATCH)]

        def read(part: range) -> None:
            into = pixels[part.start : part.stop]
            load_images(self._given.images, rows[part.start : part.stop], make, into.shape[1:], into=into)

        with closing(read_batches(parts, read, threads=self._given.config.resources.decode_threads)) as done:
            for _ in done:
                pass
        return _Decoded(rows, pixels)

    def _plain(self, image: Picture, row: int) -> NDArray[np.uint8]:
        assert self._preprocess is not None
        return self._preprocess.test(image)

    def _augmented(self, image: Picture, row: int) -> NDArray[np.uint8]:
        assert self._preprocess is not None
        return self._preprocess.augment(image, view_generator(self._given.config.seed, 0, row, VIEW), VIEW_CROP_AREA)

    def _sum(self, *counts: int) -> list[int]:
        """Each over all ranks."""
        found: list[int] = self._context.comm.sum_(
            torch.tensor(counts, dtype=torch.int64, device=wire_device(self._context.comm))
        ).tolist()
        return found

    def _gathered(self, own: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """What every rank has found, as JSON has it."""
        text = torch.from_numpy(np.frombuffer(json.dumps(own).encode(), np.uint8).copy())
        parts = self._context.comm.gather(text.to(wire_device(self._context.comm)))
        return [json.loads(bytes(part.cpu().numpy())) for part in parts]
