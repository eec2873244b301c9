from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("grappa_dist", "tests", "launch", "configs", "docs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
DATA = (".safetensors", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, from a copy: setuptools leaves build folders in its sources."""
    missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not in this environment: no wheel can be built offline")
    folder = tmp_path_factory.mktemp("packaging")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "sources" / name)
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check")
    build = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(folder / "sources")]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_the_demo_weights_and_the_type_marker_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "grappa_dist").rglob("*") if path.suffix in (".py", *DATA))
    assert inside == {str(path.relative_to(ROOT)) for path in package}
    assert {"grappa_dist/py.typed", "grappa_dist/demo/drawings_vit.safetensors"} <= inside


def test_a_user_gets_neither_the_tools_of_development_nor_faiss_unasked(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    asked = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line for line in asked if line.startswith(("pytest", "mypy", "ruff", "faiss", "scipy"))] == []
    assert {"cpu", "gpu", "benchmarks", "dev"} == set(metadata.get_all("Provides-Extra", []))
