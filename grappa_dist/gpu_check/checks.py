"""The table of all checks, and what a check is given and gives back.

A check is a function of a `Machine` that returns a `Found`, in the module that its entry names; no check is imported
before it runs. It raises `NotHere` where this machine lacks what is checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from grappa_dist.models.precision import Precision

BF16, FP32, FP64, MEMORY = "bf16", "fp32", "fp64", "memory"  # limits of the machine, by name
TERA, GIGA = 1e12, 1e9


class NotHere(Exception):
    """The machine lacks what a check is about: the row is named as skipped, with this reason."""


@dataclass(frozen=True)
class Machine:
    """What a check is given."""

    device: torch.device
    tiny: bool  # sizes for a test on a CPU
    folder: Path  # of its own, empty, removed afterwards
    limits: Mapping[str, float] = field(default_factory=dict)  # measured so far: FLOP/s by type, bytes/s of the memory
    log: Callable[[str], None] = lambda text: None  # how far it is

    def sized(self, full: Any, tiny: Any) -> Any:
        """The size for a GPU, or that for a test."""
        return tiny if self.tiny else full

    @property
    def precision(self) -> Precision:
        """That of a run on this device."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def share(self, speed: float, limit: str) -> float | None:
        """A speed as a fraction of a limit, in the unit of the limit; None where that was not measured."""
        return speed / self.limits[limit] if limit in self.limits else None


class Figure(NamedTuple):
    """A number of a row."""

    what: str
    value: float
    unit: str
    share: float | None = None  # of the limit named below
    of: str = ""

    def text(self) -> str:
        share = "" if self.share is None else f" ({self.share:.1%} of {self.of})"
        return f"{self.what} {_rounded(self.value)} {self.unit}".strip() + share


@dataclass(frozen=True)
class Found:
    """What a check gives back."""

    text: str = ""
    figures: tuple[Figure, ...] = ()
    wrong: str = ""  # what is not as it must be; "" where all is right
    limits: Mapping[str, float] = field(default_factory=dict)  # for later checks

    def line(self) -> str:
        """All of it in one line, what is wrong first."""
        return "; ".join(filter(None, [self.wrong, self.text, *(figure.text() for figure in self.figures)]))


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Check:
    """One row."""

    name: str
    what: str  # in a few words, for --list
    function: str  # module:function, of this folder where the module has no dot
    seconds: float  # that it takes on a GPU, about: it begins only if as many are left
    arguments: tuple[Any, ...] = ()

    def run(self, machine: Machine) -> Found:
        """Raises whatever goes wrong."""
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(module if "." in module else f"{__package__}.{module}"), name)
        found: Found = function(machine, *self.arguments)
        return found


THREADS = (16, 8, 2)  # that decode

CHECKS = (  # the most important first: a budget leaves out the last ones
    Check("limit-bf16", "one large product in bfloat16, random numbers", "limits:products", 4, (BF16,)),
    Check("limit-fp32", "the same in float32", "limits:products", 4, (FP32,)),
    Check("limit-fp64", "the same in float64, which decides near-ties", "limits:products", 4, (FP64,)),
    Check("memory", "the device's memory, one copy: bytes read and written", "limits:memory", 3),
    Check("copy-h2d", "from pinned memory to the device", "limits:copies", 3, ("h2d",)),
    Check("copy-d2h", "from the device to pinned memory", "limits:copies", 3, ("d2h",)),
    Check("kernel", "the Triton kernel against topk, and within its error bound", "kernels:kernel", 25),
    Check("algorithm-1", "the fused layer against Algorithm 1 of the paper, with gradients", "kernels:algorithm_1", 6),
    Check("softmax", "norm-softmax by chunks of classes against all logits", "kernels:softmax", 5),
    Check("kmeans", "labels and centroids, bit for bit those of a CPU", "rows:kmeans", 20),
    Check("knn", "neighbours and scores, bit for bit those of a CPU", "rows:knn", 15),
    Check("packed", "adaptor sets in one job against each alone", "training:packed", 20),
    Check("micro-batch", "a batch in parts against the whole batch", "training:micro_batch", 12),
    Check("resume", "a job that was killed and resumed against an undisturbed one", "training:resume", 15),
    Check("zero", "ZeRO stages 1 and 2 against 0", "training:zero", 20),
    Check("no-images", "models forward and backward with no image, as a rank without any", "training:no_images", 8),
    Check("fuse", "a fusion in micro-batches against whole batches", "training:fuse", 15),
    Check("lack-of-memory", "a step that does not fit names the setting to change", "training:lack_of_memory", 12),
    Check("rate-assign", "k-means: rows assigned to the nearest of many centroids", "row_rates:assign_rate", 8),
    Check("rate-knn", "the exact k-NN graph", "row_rates:knn_rate", 10),
    Check("rate-forward", "the frozen ViT forward, images in memory", "reading:forward_rate", 8),
    Check("rate-step", "a step of many adaptor sets, images in memory", "reading:step_rate", 15),
    Check("demo", "the whole demo against the table that a CPU gave", "demo:demo", 60),
    Check("rate-graph", "the k-NN graph of many rows through lists, and its recall", "row_rates:graph_rate", 40),
    *(
        check
        for n, embed_s in zip(THREADS, (13, 8, 8), strict=True)  # the first one draws the images of all
        for check in (
            Check(
                f"embed-{n}", f"images read, decoded by {n} threads and embedded", "reading:embed_rate", embed_s, (n,)
            ),
            Check(f"adapt-{n}", f"images read, decoded by {n} threads and trained on", "reading:adapt_rate", 11, (n,)),
        )
    ),
    Check("rate-kmeans", "an iteration of k-means of many rows and labels", "row_rates:kmeans_rate", 50),
    Check("compile", "the trial that decides on torch.compile", "kernels:compile_trial", 90),
)
