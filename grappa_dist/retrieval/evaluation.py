"""Retrieval scores of any model on any labelled images, beside another model.

Without a split every labelled image is a query among the others of its task, as in the paper, and the figures are those
that a run computes of the same images (stages/evaluate.py). Shapes: n labelled images, q queries, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import Console, pluralize
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.loader import Images
from grappa_dist.metrics import DEPTHS, metrics_of
from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.opening import OWN_BACKBONE, Named, open_models
from grappa_dist.retrieval.ranking import Ids, Ranker, Ranking, Rows, equal_pairs, relevant_counts
from grappa_dist.retrieval.scores import (
    Evaluated,
    Lookup,
    Mixed,
    Queries,
    Scores,
    Searched,
    class_scores,
    compared,
    mean_scores,
    task_scores,
)
from grappa_dist.retrieval.splits import Given, Hashed, Split, open_split

SHOWN = 10  # neighbours of each query that are kept by name
BLOCK = 16_384  # distractors that are embedded before they are searched
Paths = str | Path | Sequence[str | Path]


def evaluate(
    model: Named,
    images: Paths = (),
    *,
    queries: Paths = (),
    gallery: Paths = (),
    distractors: Paths = (),
    split_column: str | None = None,
    against: Named | None = OWN_BACKBONE,
    label_column: str | None = None,
    depths: Sequence[int] = DEPTHS,
    gallery_weights: str | None = None,
    strength: float | None = None,
    settings: Iterable[str] = (),
    trust_modules: bool | None = None,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    decode_threads: int = DECODE_THREADS,
) -> Evaluated:
    """Scores a model on labelled images, beside another one; docs/evaluate.md has the figures and what is searched.

    Args:
        model: a run directory, an exported model's, `timm:<model>`, `<module>:<function>`, or what `load_model` gives.
        images: class folders, lists with labels, or shards with labels: every image is a query among the others, or
            the side that `split_column` names: query, gallery or distractor. Else `queries` and `gallery`.
        distractors: images without labels, searched as well: never queries and never relevant.
        against: the model to compare with; "backbone": the model's own, if it has adaptors; None: nothing.
        label_column, split_column: of a list, or the keys of the shards' JSON members; `depths`: k of figures at k.
        gallery_weights, strength: of `model` alone: as `gallery`, for all tasks, and `strength` of `open_model`.
        settings, trust_modules, device: as of `open_model`; the settings are those of a backbone that is named.

    Raises:
        ValueError: there is no such model or image, or no query has an image of its class to find.
    """
    console, ks, given = Console(), _checked(depths), Given(*map(_places, (images, queries, gallery, distractors)))
    split = open_split(given, label_column=label_column, split_column=split_column, log=console.log)
    of_model: dict[str, Any] = {"gallery": gallery_weights, "strength": strength, "settings": settings}
    models = open_models(model, against, device, trust_modules=trust_modules, **of_model)
    embedders = {name: Embedder(one, console, batch_size, decode_threads) for name, one in models.items()}
    return _Evaluation(split, embedders, ks).evaluated()


def _checked(depths: Sequence[int]) -> tuple[int, ...]:
    if not depths or min(depths) < 1 or len(set(depths)) < len(depths):
        raise ValueError(f"depths {list(depths)}: expected different numbers of at least 1")
    return tuple(sorted(depths))


def _places(given: Paths) -> list[str]:
    return [str(place) for place in ([given] if isinstance(given, str | Path) else given)]


@dataclass(frozen=True)
class _Searches:
    """What is searched by all models: (n,) labels of searched rows (else -1), and the queries."""

    searched: Ids
    queries: Ids  # (q,) rows
    sizes: Ids  # (q,) R
    hidden: tuple[Ids, Ids]  # pairs of a query's place and a row


@dataclass
class _Evaluation:
    """The models on the images of a split."""

    split: Split
    embedders: Mapping[str, Embedder]
    depths: tuple[int, ...]
    bad: dict[int, str] = field(default_factory=dict)  # why, by row; distractors follow the labelled images
    copies: set[int] = field(default_factory=set)  # distractors that are labelled images

    def evaluated(self) -> Evaluated:
        z = {name: self._embedded(embedder) for name, embedder in self.embedders.items()}
        searches, unmatched = self._searches()
        own, mixed = dict[str, Ranking](), dict[str, Ranking]()
        for name, embedder in self.embedders.items():
            own[name], among_all = self._search(embedder, z.pop(name), searches)
            mixed |= {} if among_all is None else {name: among_all}
        queries = self._queries(searches, own)
        tasks = self.split.ground_truth.tasks[unmatched]
        alone = {task: int((tasks == task).sum()) for task in np.unique(tasks).tolist()}
        among = self._queries(searches, mixed) if len(mixed) == len(own) else None
        return Evaluated(
            {name: embedder.model.describe() for name, embedder in self.embedders.items()},
            len(self.split.images) + (0 if self.split.distractors is None else len(self.split.distractors)),
            {name: task_scores(queries, name, alone) for name in own},
            {name: mean_scores(queries, name, alone) for name in own},
            compared(queries),
            [(self._named(row), why) for row, why in sorted(self.bad.items())],
            [*self.split.remarks, *self._weighed()],
            searched=self._counted(searches, unmatched),
            mixed=None if among is None else _mixed(among, alone),
            metric_gains={m: compared(queries, m)[0] for m in metrics_of(self.depths)} if len(own) > 1 else {},
            classes=class_scores(queries),
            unmatched=[] if self.split.leave_one_out else [self._described(row) for row in unmatched.tolist()],
            queries=queries,
            lookup=Lookup(self._named, self._label, self._image, self._same_class),
        )

    def _embedded(self, embedder: Embedder) -> Rows:
        """Unit rows (n, D) of the labelled images, zero where there is none."""
        split, model = self.split, embedder.model
        found = np.zeros((len(split.images), embedder.dim), np.float32)
        for task, rows in self._weightings(embedder, split.rows):
            if task is not None:
                model.weigh(task)
            embedded = embedder.embed(split.images, rows)
            found[rows] = embedded.rows
            self.bad |= embedded.bad
        return found

    def _weightings(self, embedder: Embedder, rows: Ids) -> Iterator[tuple[str | None, Ids]]:
        """The rows that are embedded with the same weights of the sets, with the task that these are for."""
        if not _weighs_tasks(embedder):
            yield None, rows
            return
        for number, task in enumerate(self.split.ground_truth.task_names):
            if len(some := rows[self.split.ground_truth.tasks[rows] == number]):
                yield task, some

    def _searches(self) -> tuple[_Searches, Ids]:
        """What is searched, and the rows of queries that have nothing to find.

        Raises:
            ValueError: no query has.
        """
        split = self.split
        good = np.ones(len(split.images), bool)
        good[list(self.bad)] = False
        labels = split.ground_truth.labels
        searched = np.where(split.is_searched & good, labels, -1)
        rows = np.flatnonzero(split.is_query & good)
        hidden = (np.arange(len(rows)), rows)
        if not split.leave_one_out:
            places = np.flatnonzero(searched >= 0)
            of_query, found = equal_pairs(split.images.hashes[rows], split.images.hashes[places])
            hidden = (of_query, places[found])
        sizes = relevant_counts(labels[rows], searched, hidden)
        kept = np.flatnonzero(sizes > 0)
        if not len(kept):
            raise ValueError(
                f"no image has a label that another one shares, among {pluralize(len(rows), 'labelled image')} that "
                "can be read: there is nothing to find"
                if split.leave_one_out
                else f"none of {pluralize(len(rows), 'query', 'queries')} has an image of its class in the gallery of "
                f"{pluralize(int((searched >= 0).sum()), 'image')}: are labels and tasks the same in both?"
            )
        moved = np.full(len(rows), -1)
        moved[kept] = np.arange(len(kept))
        pairs = moved[hidden[0]] >= 0
        hidden = (moved[hidden[0]][pairs], hidden[1][pairs])
        return _Searches(searched, rows[kept], sizes[kept], hidden), rows[sizes == 0]

    def _search(self, embedder: Embedder, z: Rows, searches: _Searches) -> tuple[Ranking, Ranking | None]:
        """What the queries find among the images of their task, and of all tasks where these are several."""
        tasks = self.split.ground_truth.tasks
        places = np.arange(len(searches.queries))
        several = len(np.unique(tasks[self.split.rows])) > 1 and not _weighs_tasks(embedder)
        rankings: list[list[Ranking]] = [[], []]
        order = []
        shown = z * (searches.searched >= 0)[:, None]
        what = f"{embedder.model.variant}, {pluralize(len(places), 'query', 'queries')}"
        for task, rows in self._weightings(embedder, searches.queries):
            if task is not None:
                embedder.model.weigh(task)
            some = places if task is None else np.flatnonzero(np.isin(searches.queries, rows))
            order.append(some)
            rankers = [self._ranker(z, searches, some, tasks[searches.queries[some]], embedder)]
            if several:
                rankers.append(self._ranker(z, searches, some, None, embedder))
            hidden = _among(searches.hidden, some)
            with embedder.console.stage("search", what):
                for ranker in rankers:
                    ranker.add(shown, 0, groups=tasks, hidden=hidden)
            self._distract(embedder, rankers)
            for found, ranker in zip(rankings, rankers, strict=False):
                found.append(ranker.finish(self.split.ground_truth.labels[searches.queries[some]], searches.searched))
        own, among_all = (_joined(found, order) if found else None for found in rankings)
        assert own is not None
        return own, among_all

    def _ranker(self, z: Rows, searches: _Searches, places: Ids, groups: Ids | None, embedder: Embedder) -> Ranker:
        how: dict[str, Any] = {"depths": self.depths, "shown": SHOWN, "device": embedder.model.device}
        return Ranker(z[searches.queries[places]], searches.sizes[places], groups=groups, **how)

    def _distract(self, embedder: Embedder, rankers: Sequence[Ranker]) -> None:
        """Embeds the distractors and shows them to the queries, a block at a time."""
        if self.split.distractors is None:
            return
        images, count = Hashed.over(self.split.distractors), len(self.split.images)
        labelled = self.split.images.hashes
        for start, rows, bad in embedder.blocks(images, np.arange(len(images)), BLOCK):
            hashes = images.hashes[start : start + len(rows)]
            copies = np.flatnonzero(np.isin(hashes, labelled) & (hashes != 0) & rows.any(1))  # not of bad images
            rows[copies] = 0
            self.copies |= {start + place for place in copies.tolist()}
            self.bad |= {count + row: why for row, why in bad.items()}
            for ranker in rankers:
                ranker.add(rows, count + start)

    def _queries(self, searches: _Searches, rankings: Mapping[str, Ranking]) -> Queries:
        known, rows = self.split.ground_truth, searches.queries
        names = known.task_names, known.label_names
        return Queries(rows, known.tasks[rows], known.labels[rows], rankings, *names, depths=self.depths)

    def _counted(self, searches: _Searches, unmatched: Ids) -> Searched:
        count, others = len(self.split.images), self.split.distractors
        bad = sum(row >= count for row in self.bad)
        return Searched(
            self.split.leave_one_out,
            queries=len(searches.queries) + len(unmatched),
            gallery=int((searches.searched >= 0).sum()),
            distractors=0 if others is None else len(others) - bad - len(self.copies),
            copies=len(self.copies),
        )

    def _weighed(self) -> list[str]:
        weighed = [name for name, embedder in self.embedders.items() if _weighs_tasks(embedder)]
        several = len(np.unique(self.split.ground_truth.tasks[self.split.rows])) > 1
        if not weighed or not several:
            return []
        return [
            f"{weighed[0]} has weights for each task, so its embeddings of several tasks are not compared: no gallery "
            "that mixes them (--gallery-weights TASK takes those of one)"
        ]

    def _at(self, row: int) -> tuple[Images, int]:
        count = len(self.split.images)
        if row < count or self.split.distractors is None:
            return self.split.images, row
        return self.split.distractors, row - count

    def _named(self, row: int) -> str:
        images, row = self._at(row)
        return images.name(row) or images.where(row)

    def _label(self, row: int) -> str | None:
        known = self.split.ground_truth
        return known.label_names[known.labels[row]] if row < len(known.labels) else None

    def _image(self, row: int) -> bytes | BadImage:
        images, row = self._at(row)
        return next(iter(images.images([row])))

    def _same_class(self, one: int, other: int) -> bool:
        labels = self.split.ground_truth.labels
        return max(one, other) < len(labels) and bool(labels[one] == labels[other])

    def _described(self, row: int) -> tuple[str, str, str]:
        task = self.split.ground_truth.task_names[self.split.ground_truth.tasks[row]]
        return self._named(row), task, self._label(row) or ""


def _weighs_tasks(embedder: Embedder) -> bool:
    """Whether the weights of the adaptor sets are those that a run found for each task."""
    return bool(embedder.model.galleries) and embedder.model.gallery is None


def _among(hidden: tuple[Ids, Ids], places: NDArray[np.int64]) -> tuple[Ids, Ids]:
    """The pairs of some queries (their places, ascending), by their position among these."""
    at = np.searchsorted(places, hidden[0])
    kept = (at < len(places)) & (places[np.minimum(at, len(places) - 1)] == hidden[0])
    return at[kept], hidden[1][kept]


def _joined(rankings: Sequence[Ranking], order: Sequence[Ids]) -> Ranking:
    """The rankings of some queries each, in the order of all queries."""
    back = np.argsort(np.concatenate(order))
    units, ids, cosines = (np.concatenate([getattr(r, name) for r in rankings]) for name in ("units", "ids", "cosines"))
    return Ranking(units[back], ids[back], cosines[back])


def _mixed(queries: Queries, alone: Mapping[int, int]) -> Mixed:
    scores: dict[str, list[Scores]] = {name: task_scores(queries, name, alone) for name in queries.rankings}
    means = {name: mean_scores(queries, name, alone) for name in queries.rankings}
    return Mixed(scores, means, compared(queries))
