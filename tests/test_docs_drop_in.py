"""The examples of docs/drop_in.md, run as they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist import load_model
from tests.retrieval.photos import CLASSES, EACH, write_photos
from tests.test_docs import DOCS, section
from tests.test_export import exported

HEADINGS = ("A DataLoader loop", "scikit-learn", "As a ViT of timm's")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The names that each example has bound, in a folder with a run and photos."""
    monkeypatch.chdir(tmp_path)
    exported(tmp_path / "runs" / "mine")
    write_photos(tmp_path / "photos")
    shutil.copy("photos/cat/0.png", "query.jpg")
    found = dict[str, dict[str, Any]]()
    for heading in HEADINGS:
        (code,) = re.findall(
            r"^```python\n(.*?)^```", section(DOCS["docs/drop_in.md"], heading), re.MULTILINE | re.DOTALL
        )
        found[heading] = {}
        exec(compile(code, f"docs/drop_in.md, {heading}", "exec"), found[heading])
    return found


def test_every_example_of_the_page_runs_and_gives_the_embeddings_of_the_model(ran: dict[str, dict[str, Any]]) -> None:
    loop, pipeline, vit = (ran[heading] for heading in HEADINGS)
    assert loop["embeddings"].shape == (len(CLASSES) * EACH, load_model("runs/mine").embed_dim)
    assert loop["nearest"][:, 0].tolist() == list(range(len(CLASSES) * EACH))
    assert pipeline["accuracy"] == 1.0
    (place,) = (i for i, path in enumerate(loop["photos"].paths) if str(path) == "photos/cat/0.png")
    torch.testing.assert_close(vit["embedding"][0], loop["embeddings"][place])
    assert [tuple(one.shape) for one in vit["maps"]] == [(1, 24, 2, 2)] * 2
