"""The models of a run by name: the backbone, adaptor sets, the variants of the fusion, each at its strengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from grappa_dist.output import suggestion

BACKBONE = "backbone"
MOST_STRENGTH = 4.0  # of adaptation: further out features only get worse
SUPERVISED = "supervised"  # attention over the sets, trained with the labels of the training images
SUPERVISED_SET = "supervised-set"  # an adaptor set trained with them: adapt.supervised, not a variant of the fusion
VariantName = Literal[
    "average",
    "gallery",
    "transforms",
    "neighbours",
    "transforms-adam",
    "neighbours-adam",
    "random-one",
    "random-all",
    "supervised",
]


@dataclass(frozen=True)
class Variant:
    """One entry of `fuse.variants`: how adaptor sets become one model. Without an optimizer nothing is trained."""

    name: VariantName
    pairs: Literal["transforms", "neighbours"] | None = None  # the second image of a pair: a view, or of a neighbour
    optimizer: Literal["lars", "adam"] | None = None  # LARS is the paper's
    start: Literal["adapted", "one random set", "all sets random"] = "adapted"  # the adaptor sets before the fusion
    labels: bool = False  # trained with the labels of the training images
    per_gallery: bool = False  # the sets are weighted for each gallery, by its local structure (ours)

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in VARIANTS:
            known = f"{', '.join(VARIANTS)}{suggestion(name, VARIANTS)}"
            raise ValueError(f"{name!r} is not a variant of the fusion; there are {known}")
        return VARIANTS[name]

    @property
    def has_strengths(self) -> bool:
        """Whether `evaluate.strengths` is about it."""
        return not self.is_baseline and not self.per_gallery

    @property
    def is_baseline(self) -> bool:
        """Whether it only serves to compare with: adaptors that start at random, or labels, are not the method."""
        return self.labels or self.start != "adapted"

    def num_random_sets(self, num_partitions: int) -> int:
        """How many adaptor sets start at random and are trained with the fusion."""
        return {"adapted": 0, "one random set": 1, "all sets random": num_partitions}[self.start]


VARIANTS: Mapping[str, Variant] = {  # in the order of the report
    variant.name: variant
    for variant in (
        Variant("average"),
        Variant("gallery", per_gallery=True),
        Variant("transforms", pairs="transforms", optimizer="lars"),
        Variant("transforms-adam", pairs="transforms", optimizer="adam"),
        Variant("neighbours", pairs="neighbours", optimizer="lars"),
        Variant("neighbours-adam", pairs="neighbours", optimizer="adam"),
        Variant("random-one", pairs="neighbours", optimizer="lars", start="one random set"),  # M+A_1 of the paper
        Variant("random-all", pairs="neighbours", optimizer="lars", start="all sets random"),  # M* of the paper
        Variant("supervised", optimizer="adam", labels=True),
    )
}


def at_strength(model: str, strength: float) -> str:
    """The name of a model at a strength of adaptation, `average@0.5`; as trained that of the model."""
    return model if strength == 1 else f"{model}@{str(float(abs(strength))).removesuffix('.0')}"


def split_strength(name: str) -> tuple[str, float]:
    """The name of a model without its strength of adaptation, and that: 1 where the name has none."""
    model, at, strength = name.rpartition("@")
    try:
        return (model, float(strength)) if at else (name, 1.0)
    except ValueError:
        return name, 1.0
