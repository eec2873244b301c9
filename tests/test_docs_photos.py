"""The notebook and the commands of the README on one small folder of images: they run, one after another."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from grappa_dist.cli.main import main
from tests.structure import ROOT
from tests.test_docs import DOCS
from tests.test_docs_commands import process, run_by

__all__ = ["process"]  # a fixture

NOTEBOOK = ROOT / "examples" / "photos.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def notebook(folder: Path) -> nbformat.NotebookNode:
    """The notebook, executed in the folder, which then holds photos/ and runs/mine."""
    found = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        NotebookClient(found, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return found


def shown(notebook: nbformat.NotebookNode, source: str) -> str:
    """What the cell that contains some source has put out: text and pages."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
    parts = (output.get("data", {"text/plain": output.get("text", "")}) for output in cell.outputs)
    return "\n".join("".join(part.get("text/html", part.get("text/plain", ""))) for part in parts)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_scores_verdict_report_and_hits(notebook: nbformat.NotebookNode) -> None:
    assert "{'train': 72, 'test': 56}" in shown(notebook, "draw(scale")
    said = shown(notebook, "print(run)")
    assert re.search(r"^backbone +\d+\.\d", said, re.MULTILINE)
    assert "verdict  " in said
    assert "queries=" in shown(notebook, "run.verdict")
    assert "'model': 'backbone'" in shown(notebook, "run.scores")
    assert shown(notebook, "run.report").startswith("<iframe srcdoc=")
    hits = shown(notebook, "argsort").splitlines()
    assert len(hits) == 5
    assert hits[0].startswith("1.000  photos/test/")


@pytest.mark.slow
@pytest.mark.usefixtures("process")
def test_the_commands_of_the_docs_run(
    notebook: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the folder of the notebook, whose run they find finished, so nothing is trained."""
    monkeypatch.chdir(folder)
    shutil.copy("runs/mine/config.yaml", "mine.yaml")
    shutil.copy(next(Path("photos", "test").rglob("*.jpg")), "query.jpg")
    commands = [words for lines in run_by("test_the_commands_of_the_docs_run") for words in lines]
    assert {words[1] for words in commands} >= {"run", "status", "search", "plan", "doctor", "clean"}
    for words in commands:
        assert main(words[1:]) == 0, shlex.join(words)
        found = capfd.readouterr()
        assert found.out, shlex.join(words)
        assert "adapt: " not in found.err, shlex.join(words)  # as the stage begins


@pytest.mark.slow
@pytest.mark.usefixtures("notebook")
def test_the_python_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = re.findall(r"^```python\n(.*?)^```", DOCS["README.md"], re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"image": Image.open(next(Path("photos", "test").rglob("*.jpg")))}
    for block in code:
        exec(block.replace("timm:vit_small_patch16_224.dino", "grappa_dist.demo.backbone:create"), names)
    assert names["run"].report == folder / "runs" / "mine" / "report" / "report.html"
    assert names["embedding"].norm().item() == pytest.approx(1.0)
