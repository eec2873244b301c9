"""The content of a report. Every section may be empty: the page then says so or leaves it out.

Shapes: L layers, N adaptor sets, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from grappa_dist.report.queries import ClassGain, Intervals, Why
from grappa_dist.verdict import Verdict


class ScoreRow(TypedDict):
    """Retrieval of one model on one task; fractions in [0, 1]."""

    model: str  # "backbone", "k=<K>", "oracle", a variant of the fusion, or "supervised-set"
    task: str
    queries: int
    r_precision: float
    map_at_r: float
    recall_at_1: float


class LabelFree(TypedDict):
    """A figure that needs no label, for one model; `value` is a fraction of `queries`."""

    model: str
    figure: str  # "augmented view finds its source"
    value: float
    queries: int
    of_graph: NotRequired[bool]  # of the k-NN graph that the model was trained with, if any


class BadRow(TypedDict):
    """A row that did not decode, or missing images, which have no row; used in nothing."""

    shard: str
    key: str
    reason: str
    images: NotRequired[int]  # 1 by default
    file: NotRequired[str]  # its name before it was written into the shard


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One retrieved image; `correct` is None if the images have no labels."""

    image: bytes  # JPEG, PNG, WebP or GIF
    score: float
    correct: bool | None = None
    name: str = ""  # of its file


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """One query and the images that each model retrieves for it, nearest first."""

    query: bytes
    results: dict[str, list[Hit]]
    task: str | None = None
    label: str | None = None
    name: str = ""  # of its file


@dataclass(frozen=True, kw_only=True)
class ChangedQuery:
    """A query that the compared model is worst on, or on which it differs most from the backbone."""

    why: Why
    gallery: Gallery
    value: float  # R-Precision of the compared model, a fraction
    baseline: float  # and of the backbone


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How k-means went for one K."""

    k: int
    inertia: list[float]  # one value an iteration
    sizes: list[int]  # clusters by size, see `size_histogram`
    largest: int
    median: float
    imbalance: float  # K * sum n^2 / (sum n)^2: 1 when all clusters are of one size
    empty_repaired: int
    empty_left: int
    singletons_share: float  # clusters of one image, as a share of all K
    exact_share: float  # rows whose nearest centroid was settled by exact scores, as a share of all rows
    searched_share: float = 1.0  # distances that were computed, as a share of all; bounds excluded the others
    method: str = "exact"  # or sampled, hierarchical, approximate
    reason: str = ""  # why this method
    updates: int | None = None  # of the K centroids; None: one less than entries of `inertia`
    sampled_share: float = 1.0  # rows that the centroids were fitted to
    agreement: float | None = None  # rows whose label is the exact one, as a share of those compared; None: all are
    agreement_rows: int = 0  # that were compared
    bound: int | None = None  # most images of a cluster
    moved: int = 0  # images that the bound moved to another cluster
    unbalanced_inertia: float | None = None  # before these moves
    restarts: list[float] = field(default_factory=list)  # inertia of each, if there were several


@dataclass(frozen=True, kw_only=True)
class Nesting:
    """How nested the partition of `fine` clusters is in that of `coarse` ones; shares of rows."""

    coarse: int
    fine: int
    nestedness: float  # rows whose coarse cluster is the majority one of their fine cluster
    chance: float  # the same when coarse labels are permuted over rows
    rows: int  # of the sample that it was computed on
    of: int  # all rows


@dataclass(frozen=True, kw_only=True)
class ClusterSample:
    """A cluster with some of its images."""

    pick: Literal["largest", "median", "drawn"]  # why this one
    label: int
    size: int
    images: list[bytes]


@dataclass(frozen=True, kw_only=True)
class ContactSheet:
    """Sample clusters of one partition."""

    k: int
    clusters: list[ClusterSample]


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that the page shows."""

    title: str
    rows: list[ScoreRow] = field(default_factory=list)  # [] without labels
    intervals: Intervals = field(default_factory=dict)  # of R-Precision
    verdict: Verdict | None = None  # None without labels
    has_test: bool = True  # else training images were evaluated
    labels: str = ""  # where there are no scores: which labels were read
    label_free: list[LabelFree] = field(default_factory=list)
    attention: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)  # fusion, group: (L, N) mean
    entropy: dict[str, list[float]] = field(default_factory=dict)  # fusion: (L,) mean entropy / log N, 1 = uniform
    entropies: dict[str, list[list[float]]] = field(default_factory=dict)  # fusion: (steps, L), the same in training
    shares: dict[str, list[list[float]]] = field(default_factory=dict)  # fusion: (steps, N) mean attention in training
    decay: dict[str, list[float]] = field(default_factory=dict)  # fusion: (L,) decay over gradient of Q and K
    sets: list[str] = field(default_factory=list)  # the N adaptor sets, "k=64", ...
    random_sets: dict[str, list[str]] = field(default_factory=dict)  # fusion: its randomly initialised sets
    clusterings: list[Clustering] = field(default_factory=list)
    nestings: list[Nesting] = field(default_factory=list)  # of consecutive K; [] with one K
    sheets: list[ContactSheet] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # job: [{"step", "loss", ...}]
    galleries: list[Gallery] = field(default_factory=list)
    classes: list[ClassGain] = field(default_factory=list)  # the compared model against the backbone
    class_names: list[str] = field(default_factory=list)  # by label
    changed: list[ChangedQuery] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    config_yaml: str = ""
    notes: list[str] = field(default_factory=list)
