"""`torch.export` files (.pt2): a model that torch alone loads, in Python by torch.export.load or compiled for C++."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from grappa_dist.formats.exportable import quiet

METADATA = "grappa_dist.json"  # a file in the archive: torch.export.load(path, extra_files={"grappa_dist.json": ""})


def write(traced: ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    """Writes the file; `about` is kept in it as METADATA."""
    traced._example_inputs = None  # they would be the one pickle in the archive
    with quiet(), path.open("wb") as file:
        torch.export.save(traced, file, extra_files={METADATA: json.dumps(about, indent=1)})


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The embeddings of images by a file that was just written, (B, 3, S, S) -> (B, D)."""
    with quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(images)[0]
        return found

    return run
