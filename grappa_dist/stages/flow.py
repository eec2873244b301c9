"""All artefacts of a run, grouped by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from grappa_dist.artifacts import Artifact, finished
from grappa_dist.data.shards import ImageShards
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.damages import Damage
from grappa_dist.variants import SUPERVISED, SUPERVISED_SET, Variant


class Supervision(NamedTuple):
    """The labels of the training images, and what is trained with them."""

    ground_truth: Artifact  # as in the JSON members
    classes: Artifact  # as numbers, in the form of a partition
    adaptors: Artifact | None  # the supervised set
    fusion: Artifact | None  # the supervised fusion

    @property
    def trained(self) -> dict[str, Artifact]:
        """What is trained with labels, by its name in the table."""
        both = {SUPERVISED_SET: self.adaptors, SUPERVISED: self.fusion}
        return {name: artifact for name, artifact in both.items() if artifact is not None}


class Exclusion(NamedTuple):
    """Which rows `data.exclude` leaves out; None of images that no list says anything of."""

    train: Artifact | None = None
    test: Artifact | None = None  # of the images that are evaluated


@dataclass(frozen=True)
class Flow:
    """Every artefact of a run, in the order in which they are made."""

    train: ImageShards
    test: ImageShards  # some of the training images if there are no test images
    supervision: Supervision | None  # if a row to compare with needs labels of the training images
    features: tuple[Artifact, ...]  # of the training images, by the frozen backbone
    labels: Mapping[int, Artifact]  # by K
    partitions: Artifact  # how these labels agree, and samples of their clusters
    adaptors: Mapping[int, Artifact]
    fusions: Mapping[str, Artifact]  # by variant, those that are trained: `on_pairs` and the supervised one
    models: Mapping[str, ModelSpec]  # that are evaluated, by name in the table
    test_features: Mapping[str, tuple[Artifact, ...]]
    ground_truth: Artifact
    galleries: Artifact | None  # weights of the sets for each task, if a variant needs them
    scores: Mapping[str, Artifact]
    insights: Mapping[str, Artifact]
    report: Artifact
    model: Artifact
    excluded: Exclusion = Exclusion()  # noqa: RUF009 - not changed
    damages: tuple[Damage, ...] = ()  # of these artefacts, which were made anew

    @property
    def on_pairs(self) -> dict[str, Artifact]:
        """The fusions that are trained on pairs of images, without labels."""
        return {name: artifact for name, artifact in self.fusions.items() if Variant.parse(name).pairs}

    def needs_backbone(self, until: str | None = None) -> bool:
        """Whether something is missing that cannot be made without the weights of the frozen backbone.

        Args:
            until: the stage after which the run ends; None: the last.
        """
        supervised = self.supervision.adaptors if self.supervision is not None else None
        tested = [artifact for features in self.test_features.values() for artifact in features]
        made: dict[str, list[Artifact]] = {
            "embed": [*self.features],
            "pseudo_label": [],
            "adapt": [*self.adaptors.values(), *([supervised] if supervised is not None else [])],
            "fuse": [*self.fusions.values()],
            "evaluate": [*tested, *self.insights.values(), self.model],
        }
        stages = [*made]
        wanted = stages if until is None else stages[: stages.index(until) + 1]
        return not all(finished(artifact for stage in wanted for artifact in made[stage]))


def artifacts_of(flow: Flow) -> list[Artifact]:
    """All artefacts of a run, each once, in the order in which they are made."""
    found: dict[str, Artifact] = {}

    def add(value: Any) -> None:
        if isinstance(value, Artifact):
            found[value.name] = value
        elif isinstance(value, Mapping | tuple):
            for part in value.values() if isinstance(value, Mapping) else value:
                add(part)

    for field in fields(flow):
        add(getattr(flow, field.name))
    return list(found.values())
