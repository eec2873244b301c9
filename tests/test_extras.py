"""A light install: what works without the optional packages, and the line that names a missing one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from grappa_dist.console import Ending
from grappa_dist.extras import EXTRAS, MissingPackage, install_line, require
from grappa_dist.inputs.tables import Table
from tests.test_export import SIZE, exported

ROOT = Path(__file__).parents[1]
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({list(EXTRAS)})); "  # as if none of them were installed
SCRIPT = str(ROOT / "launch" / "full_pipeline.py")
COMMAND = "from grappa_dist.cli.main import main; sys.exit(main(sys.argv[1:]))"
CONFIG = "name: light\ndata: {train: photos}\nbackbone: {name: 'timm:vit_tiny_patch16_224'}\n"


def light(code: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python without the optional packages."""
    command = [sys.executable, "-c", WITHOUT + code, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage) as caught:
        require("json", "pyarrow", what="photos.parquet")
    assert str(caught.value) == (
        "photos.parquet: needs pyarrow, which is not installed: pip install 'grappa-dist[parquet]'"
    )
    require("json", "click")


def test_a_table_without_pyarrow_is_named_with_the_install_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"t\.parquet: needs pyarrow, .*'grappa-dist\[parquet\]'"):
        Table(tmp_path / "t.parquet")


@pytest.mark.parametrize("module", ["ray", "faiss"])
def test_a_package_that_comes_as_cpu_and_gpu_names_both(module: str) -> None:
    assert install_line(module) == "pip install 'grappa-dist[cpu]', or 'grappa-dist[gpu]' where there are GPUs"


def test_the_page_about_installing_has_every_extra() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    assert [extra for extra in sorted(set(EXTRAS.values())) if f"`{extra}`" not in page] == []


def test_an_import_of_a_missing_package_anywhere_ends_a_program_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(name: str) -> None:
        __import__(name)

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert Ending().of(lambda: work("deepspeed")) == 2
    assert capsys.readouterr().err == f"error: deepspeed is not installed: {install_line('deepspeed')}\n"
    assert Ending().of(lambda: work("no_such_module")) == 1  # a bug, or a user's module
    assert "No module named 'no_such_module'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "args"),
    [
        (f"import runpy; runpy.run_path({SCRIPT!r}, run_name='__main__')", ["--config", "light.yaml"]),
        (COMMAND, ["run", "photos"]),
    ],
)
def test_a_run_without_what_it_needs_says_so_in_one_line_and_leaves_no_folder(
    program: str, args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "light.yaml").write_text(CONFIG)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    done = light(program, *args, "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: ray is not installed: {install_line('ray')}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_for_the_hub_is_made_and_loads_without_the_optional_packages(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    verb = ["export", "run", "--to", "hub-folder", "--dtype", "bf16", "--out", "hub", "--check-count", "5"]
    done = light(COMMAND, *verb, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    code = (
        "import torch; from grappa_dist.export import RetrievalModel; "
        f"print(RetrievalModel.from_pretrained('hub')(torch.rand(2, 3, {SIZE}, {SIZE})).norm(dim=1).round().tolist())"
    )
    done = light(code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1.0, 1.0]\n", "")
    done = light(COMMAND, "export", "run", "--to", "onnx", "--out", "a.onnx", cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (
        2,
        f"error: {tmp_path}/a.onnx: needs onnx, which is not installed: {install_line('onnx')}",
    )
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.slow
def test_a_model_loads_embeds_and_is_scored_without_the_optional_packages(tmp_path: Path) -> None:
    exported(tmp_path / "run")
    code = (
        "import torch, grappa_dist; from grappa_dist.metrics import retrieval_scores; "
        f"z = grappa_dist.load_model('run')(torch.rand(4, 3, {SIZE}, {SIZE})); "
        "print(sorted(retrieval_scores(z, torch.tensor([0, 0, 1, 1]))))"
    )
    done = light(code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "r_precision" in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["check", "--help"]])
def test_help_and_version_work_without_the_optional_packages(args: list[str], tmp_path: Path) -> None:
    done = light(COMMAND, *args, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "grappa-dist" in done.stdout


def test_doctor_says_of_a_light_install_what_is_missing_and_that_no_run_is_possible(tmp_path: Path) -> None:
    done = light(COMMAND, "doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    for name, module in {"Ray": "ray", "DeepSpeed": "deepspeed", "faiss": "faiss"}.items():
        assert findings[name]["means"] == f"runs need it: {install_line(module)}"
    assert [name for name, finding in findings.items() if finding["stops_runs"]] == ["Ray", "DeepSpeed", "faiss"]
    assert findings["HEIC"]["means"] == f"such photos are left out: {install_line('pillow_heif')}"
    assert findings["parquet"]["means"] == install_line("pyarrow")
