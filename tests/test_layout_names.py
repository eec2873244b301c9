"""The names of all artefacts of three configs, against a record, so that no fingerprint changes unnoticed.

A change that renames artefacts on purpose writes the record anew, with the root of the repository on PYTHONPATH:
    python -m tests.test_layout_names
The difference of tests/golden/artifact_names.json then shows what a finished run would make again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import load
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.layout import lay_out

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "golden" / "artifact_names.json"
SIZES = {  # training and test images, and images a shard
    "demo": (4096, 1024, 256),
    "comparison": (4096, 1024, 256),
    "mrt": (133_339, 133_876, 50_000),
}


def made_up_shards(split: str, rows: int, per_shard: int) -> ImageShards:
    """Shards that are not on any disk, described as an index would describe them."""
    shards = []
    for number, first in enumerate(range(0, rows, per_shard)):
        name, digest = f"{split}-{number:06d}.tar", hashlib.sha256(f"{split} {number}".encode()).hexdigest()
        shards.append(Shard(name, f"/none/{name}", min(per_shard, rows - first), 1000, digest))
    return ImageShards(tuple(shards), (None,) * len(shards))


def artifacts_in(value: object) -> Iterator[Artifact]:
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, ImageShards):
        return
    elif isinstance(value, Mapping):
        yield from artifacts_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from artifacts_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from artifacts_in(getattr(value, field.name))


def names_of(config: str) -> list[str]:
    """The names of all artefacts of a run, on any machine: the libraries that decode pixels are left out."""
    num_train, num_test, per_shard = SIZES[config]
    train, test = made_up_shards("train", num_train, per_shard), made_up_shards("test", num_test, per_shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grappa_dist.stages.embed.pixels_class", lambda: "0123456789")
        flow = lay_out(load(ROOT / "configs" / f"{config}.yaml"), Store(Path("/none")), train, test)
    return sorted({artifact.name for artifact in artifacts_in(flow)})


@pytest.mark.parametrize("config", SIZES)
def test_all_artefacts_have_the_names_of_the_record(config: str) -> None:
    assert names_of(config) == json.loads(RECORD.read_text())[config]


def test_the_record_has_artefacts_of_every_stage_and_is_of_no_other_config() -> None:
    record = json.loads(RECORD.read_text())
    assert list(record) == list(SIZES)
    kinds = {
        "features",
        "labels",
        "partitions",
        "adaptors",
        "fusion",
        "truth",
        "scores",
        "insight",
        "reports",
        "models",
    }
    for names in record.values():
        assert {re.split("[/-]", name)[0] for name in names} == kinds


if __name__ == "__main__":
    RECORD.write_text(json.dumps({config: names_of(config) for config in SIZES}, indent=1) + "\n")
