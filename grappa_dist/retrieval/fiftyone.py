"""Images with their labels, embeddings and places on maps as a folder that FiftyOne reads.

FiftyOne needs a database server and narrow ranges of packages, so it is not imported: this writes its format
`FiftyOneDataset` (`metadata.json`, `samples.json`, files below `data/`), which `fiftyone.Dataset.from_dir` reads. Its
classes are named by it. Fields of an image: `name`, `task`, `ground_truth` (a Classification, null without a label) and
for each model `embedding_<model>` and `map_<model>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grappa_dist.data.decoding import BadImage, suffix_of
from grappa_dist.files import make_folder, remove_folder, rename, replace, write_bytes, write_json
from grappa_dist.output import HARMFUL
from grappa_dist.retrieval.map import Layout
from grappa_dist.retrieval.map_images import MapImages

VERSION = "1.0.0"  # of FiftyOne whose format this is; later ones migrate it
DATA = "data"
_FIELDS = "fiftyone.core.fields."


def check_new(folder: Path) -> None:
    """Raises ValueError unless a folder can be made there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; expected a folder that does not exist, or is empty")


def write_fiftyone(folder: Path, images: MapImages, layouts: Sequence[Layout]) -> int:
    """Writes the folder, with a copy of every image that can still be read; how many these are.

    Raises:
        ValueError: the folder holds something.
    """
    check_new(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    remove_folder(partial)
    make_folder(partial / DATA)
    fields = {model: re.sub(r"\W+", "_", model).strip("_") for model in images.embeddings}
    written = 0

    def write(path: Path) -> None:
        nonlocal written
        written = 0  # where it is tried again
        with path.open("w", encoding="utf-8") as file:
            file.write('{"samples": [')
            for sample in _samples(partial, images, layouts, fields):
                file.write(f"{',' if written else ''}\n{json.dumps(sample)}")
                written += 1
            file.write("\n]}\n")

    replace(partial / "samples.json", write)
    write_json(partial / "metadata.json", _metadata(folder.name, list(fields.values())))
    if folder.is_dir():
        folder.rmdir()
    rename(partial, folder)
    return written


def _samples(
    folder: Path, images: MapImages, layouts: Sequence[Layout], fields: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    ground_truth = images.ground_truth
    for place, name in enumerate(images.names):
        data = images.read(place)
        if isinstance(data, BadImage):
            continue
        path = f"{DATA}/{place:06d}.{suffix_of(data)}"
        write_bytes(folder / path, data)
        label = int(ground_truth.labels[place])
        yield {
            "_id": _object_id("sample", name, place),
            "filepath": path,
            "tags": [],
            "_media_type": "image",
            "_rand": int(hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8], 16) / 2**32,
            "name": _plain(name),
            "task": _plain(ground_truth.task_names[ground_truth.tasks[place]]),
            "ground_truth": None if label < 0 else _classification(ground_truth.label_names[label], name, place),
            **{f"embedding_{fields[m]}": _rounded(rows[place]) for m, rows in images.embeddings.items()},
            **{f"map_{fields[layout.model]}": _rounded(layout.points[place]) for layout in layouts},
        }


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def _classification(label: str, name: str, place: int) -> dict[str, Any]:
    return {"_id": _object_id("label", name, place), "_cls": "Classification", "tags": [], "label": _plain(label)}


def _plain(text: str) -> str:
    """A text without characters that do harm: its database refuses names that are not UTF-8."""
    return HARMFUL.sub("\N{REPLACEMENT CHARACTER}", text)


def _object_id(what: str, name: str, place: int) -> dict[str, str]:
    """An id as its database has them: 12 bytes, the same for the same image."""
    return {"$oid": hashlib.sha256(f"{what} {place} {name}".encode(errors="replace")).hexdigest()[:24]}


def _metadata(name: str, models: Sequence[str]) -> dict[str, Any]:
    numbers = [f"{what}_{model}" for what in ("embedding", "map") for model in models]
    return {
        "name": name,
        "version": VERSION,
        "media_type": "image",
        "tags": [],
        "info": {},
        "classes": {},
        "default_classes": [],
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "sample_fields": [
            _field("id", "ObjectIdField", db_field="_id"),
            _field("filepath", "StringField"),
            _field("tags", "ListField", subfield=f"{_FIELDS}StringField"),
            _field("name", "StringField"),
            _field("task", "StringField"),
            _label_field(),
            *(_field(field, "ListField", subfield=f"{_FIELDS}FloatField") for field in numbers),
        ],
        "frame_fields": [],
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _label_field() -> dict[str, Any]:
    inside = [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("tags", "ListField", subfield=f"{_FIELDS}StringField"),
        _field("label", "StringField"),
        _field("confidence", "FloatField"),
        _field("logits", "VectorField"),
    ]
    kind = "fiftyone.core.labels.Classification"
    return _field("ground_truth", "EmbeddedDocumentField", embedded_doc_type=kind, fields=inside)


def _field(name: str, kind: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "ftype": f"{_FIELDS}{kind}",
        "embedded_doc_type": None,
        "subfield": None,
        "fields": [],
    }
    return {**found, "db_field": name, "description": None, "info": None, "read_only": False, **more}
