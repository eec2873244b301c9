"""The Python of docs/export.md runs on files that the command wrote; its commands run in test_docs_photos.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from grappa_dist.formats.convert import Wanted, convert
from tests.test_docs import DOCS
from tests.test_export import SIZE, exported

BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS["docs/export.md"], re.MULTILINE | re.DOTALL)


def test_the_page_has_python_for_each_format() -> None:
    assert [next(word for word in ("onnxruntime", "torch", "grappa_dist") if word in block) for block in BLOCKS] == [
        "onnxruntime",
        "torch",
        "grappa_dist",
    ]


@pytest.mark.long
def test_the_python_of_the_page_runs(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    for out, to in (("average.onnx", "onnx"), ("average.pt2", "torch"), ("for-the-hub", "hub-folder")):
        convert(tmp_path / "run", tmp_path / "models" / out, Wanted(to, check_count=3))  # type: ignore[arg-type]
    Image.new("RGB", (50, 40), (9, 99, 200)).save(tmp_path / "query.jpg")
    shown = "print(len(embeddings), round(float((embeddings**2).sum(-1)[0]), 4))\n"
    code = (
        BLOCKS[0] + shown + BLOCKS[1].replace("48, 48", f"{SIZE}, {SIZE}") + shown + BLOCKS[2] + "print(model.sets)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1 1.0\n3 1.0\n['k=0', 'k=1']\n"), done.stderr
