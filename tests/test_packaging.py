from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image, ImageDraw

import grappa_dist
from grappa_dist.cli.main import VERBS
from grappa_dist.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED_EXTRAS = ("cpu", "dev")  # what `make` installs, and what requirements-lock.txt is made of
FOUND_SLOWLY = {"aiobotocore", "boto3", "botocore"}  # pip would try many versions of each
SOURCES = ("grappa_dist", "tests", "launch", "configs", "docs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
DATA = (".css", ".html", ".js", ".safetensors", ".svg", ".typed", ".yaml", ".json")


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


def test_a_light_install_brings_neither_the_tools_of_development_nor_what_runs_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    asked = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    optional = ("pytest", "mypy", "ruff", "moto", "faiss", *(name.replace("_", "-") for name in EXTRAS))
    assert [line for line in asked if line.startswith(optional)] == []
    assert {*EXTRAS.values(), "gpu", "run", "dev"} == set(metadata.get_all("Provides-Extra", []))


def _pins(file: str) -> dict[str, Version]:
    """Package -> version of the lines `package==version`."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def _requirements(*extras: str) -> list[Requirement]:
    """Those of the package and of these extras, and of the extras that these name in turn."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    found = [Requirement(line) for line in lines]
    own = {extra for requirement in found if requirement.name == PROJECT["name"] for extra in requirement.extras}
    if own - set(extras):
        return _requirements(*{*extras, *own})
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def test_the_version_of_the_package_is_that_of_its_metadata() -> None:
    assert PROJECT["version"] == grappa_dist.__version__


def test_every_pin_of_the_constraints_is_a_requirement_and_satisfies_its_range() -> None:
    ranges = {canonicalize_name(r.name): r.specifier for r in _requirements(*PROJECT["optional-dependencies"])}
    pins = _pins("constraints.txt")
    assert pins.keys() - ranges.keys() == FOUND_SLOWLY
    assert [name for name, version in pins.items() if name in ranges and version not in ranges[name]] == []


def test_the_lock_has_every_requirement_in_its_range_and_every_pin_of_the_constraints() -> None:
    lock = _pins("requirements-lock.txt")
    requirements = {canonicalize_name(r.name): r.specifier for r in _requirements(*TESTED_EXTRAS)}
    assert requirements.keys() - lock.keys() == set()
    assert [name for name, allowed in requirements.items() if lock[name] not in allowed] == []
    pins = {name: version for name, version in _pins("constraints.txt").items() if name != "faiss-gpu"}
    assert {name: lock[name].public for name in pins} == {name: str(version) for name, version in pins.items()}


def test_the_lock_gives_a_hash_for_every_package_and_no_address() -> None:
    text = (ROOT / "requirements-lock.txt").read_text()
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(_pins("requirements-lock.txt"))
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE)] == []
    assert "://" not in text


def test_every_optional_module_is_brought_by_the_extra_that_its_message_names() -> None:
    distributions = {"faiss": "faiss-cpu", "umap": "umap-learn", "sklearn": "scikit-learn"}
    for module, extra in EXTRAS.items():
        brought = {canonicalize_name(requirement.name) for requirement in _requirements(extra)}
        assert distributions.get(module, canonicalize_name(module)) in brought, module


@pytest.mark.parametrize(
    ("machine", "faiss"), [("x86_64", "faiss-gpu"), ("aarch64", "faiss-cpu"), ("arm64", "faiss-cpu")]
)
def test_the_extra_for_gpus_brings_one_faiss_that_has_wheels_for_the_processor(machine: str, faiss: str) -> None:
    asked = [r for r in _requirements("gpu") if r.marker is None or r.marker.evaluate({"platform_machine": machine})]
    assert [r.name for r in asked if r.name.startswith("faiss")] == [faiss]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has what the wheel installs, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ("--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, timeout=180, cwd=folder)
    return folder


def from_wheel(installed: Path, cwd: Path, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package as the wheel installs it, in a folder that has no checkout on its path."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_the_wheel_brings_the_command_with_every_verb(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "bin" / "grappa-dist")
    done = from_wheel(installed, tmp_path, script, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"grappa-dist  {grappa_dist.__version__} ({installed / 'grappa_dist'})"
    done = from_wheel(installed, tmp_path, script, "--help")
    assert [verb for verb in VERBS if f"  {verb} " not in done.stdout] == []


VERBS_ON_A_RUN = (
    "status runs/mine",
    "plan runs/mine",
    "check runs/mine",
    "clean runs/mine",
    "export runs/mine --name backbone --out models/backbone",
    "embed --model runs/mine --images photos --out embeddings",
    "search --model runs/mine --images photos photos/disc/0.jpg",
    "evaluate --model models/backbone --images photos",
    "duplicates --images embeddings --threshold 0.999",
    "shards --images photos --out shards --workers 1",
    "tables runs/mine",
    "doctor",
)
ALL_OF_THEM = """
import json, sys
from grappa_dist.cli.main import main
for command in json.loads(sys.argv[1]):
    print(f"$ {command}", flush=True)
    assert main(command.split()) == 0, command
"""


@pytest.mark.slow
def test_a_wheel_alone_goes_from_photos_to_a_model_and_every_verb_works_on_it(installed: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    settings = ("clustering.num_labels=[4]", "adapt.epochs=1", "fuse.variants=[average]")
    backbone = ("--backbone", "grappa_dist.demo.backbone:create")
    script = str(installed / "bin" / "grappa-dist")
    run = ("run", "photos", "--out", "runs/mine", *backbone, *settings)
    done = from_wheel(installed, tmp_path, script, *run, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "model").is_dir()
    done = from_wheel(installed, tmp_path, "-c", ALL_OF_THEM, json.dumps(VERBS_ON_A_RUN), timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ ") == len(VERBS_ON_A_RUN)
    elsewhere = {"run", "bench", "serve", "map"}  # above, in tests/test_bench.py, and in tests of these verbs
    assert {command.split()[0] for command in VERBS_ON_A_RUN} | elsewhere == VERBS.keys()


def write_photos(folder: Path) -> None:
    """Sixty photos of four classes: a shape of its own colour on a dark ground."""
    draws = random.Random(0)
    for kind, colour in {"disc": "red", "square": "green", "bar": "blue", "ring": "white"}.items():
        (folder / kind).mkdir(parents=True)
        for number in range(15):
            ground = tuple(draws.randrange(60) for _ in range(3))
            image, x, y = Image.new("RGB", (72, 64), ground), draws.randrange(32), draws.randrange(24)
            canvas = ImageDraw.Draw(image)
            if kind in ("disc", "ring"):
                canvas.ellipse((x, y, x + 36, y + 36), colour if kind == "disc" else None, colour, 6)
            else:
                canvas.rectangle((x, y, x + 36, y + (36 if kind == "square" else 9)), colour)
            image.save(folder / kind / f"{number}.jpg", quality=95)
