"""The public API is what the docstring of the package lists: importable, documented, with these parameters."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import grappa_dist

API = {
    "grappa_dist.fit": ["images", "out"],
    "grappa_dist.load_model": ["run_or_model_dir"],
    "grappa_dist.evaluate": ["model", "images"],
    "grappa_dist.metrics.retrieval_scores": ["z", "labels"],
    "grappa_dist.training.norm_softmax": ["z", "weight", "labels", "gamma"],
    "grappa_dist.training.barlow_twins": ["za", "zb", "beta", "allsum"],
    "grappa_dist.models.Grappa": ["backbone", "num_sets", "bottleneck", "attention"],
}


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_the_docstring_of_the_package_lists_the_public_names_with_a_sentence_each() -> None:
    listed = re.findall(r"^(grappa_dist\.[\w.]+)\(([\w, ]+)\)\n    \w.+\.$", grappa_dist.__doc__ or "", re.MULTILINE)
    assert {path: parameters.split(", ") for path, parameters in listed} == API


@pytest.mark.parametrize("path", API)
def test_a_public_name_has_a_docstring_and_the_listed_parameters(path: str) -> None:
    found = imported(path)
    assert (found.__doc__ or "").strip()
    parameters = inspect.signature(found).parameters
    names = list(parameters)
    assert names[: len(API[path])] == API[path]
    others = [parameters[name] for name in names[len(API[path]) :]]
    assert all(p.default is not p.empty for p in others if p.kind is not p.VAR_KEYWORD)


@pytest.mark.parametrize("path", API)
def test_a_public_name_of_a_folder_is_in_its_all(path: str) -> None:
    module, _, name = path.rpartition(".")
    exported = getattr(import_module(module), "__all__", None)
    assert exported is None or name in exported


def test_the_losses_and_scores_take_tensors_by_position() -> None:
    z, labels = torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    assert imported("grappa_dist.metrics.retrieval_scores")(z, labels)["r_precision"] == 1
    loss = imported("grappa_dist.training.norm_softmax")(z, torch.eye(4)[:2], labels, 1.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)))
    za, zb = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert float(imported("grappa_dist.training.barlow_twins")(za, zb, 0.1).detach()) > 0


def test_the_package_imports_without_torch() -> None:
    code = "import sys, grappa_dist; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
