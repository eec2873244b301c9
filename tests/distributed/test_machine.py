"""What a machine, its code and the command are called: read from its files, without names of hosts or secrets."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from grappa_dist.distributed import machine
from grappa_dist.distributed.machine import (
    Machine,
    code_version,
    command_line,
    listed_gpus,
    memory_limit,
    multiplies_bf16,
    origin,
    usable_cores,
)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4.0), ("150000 100000", 1.5), ("800000 100000", 4.0)])
def test_cores_are_those_of_the_container_where_it_has_fewer(
    quota: str, cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores(tmp_path) == cores
    assert usable_cores(tmp_path / "none") == 4


def test_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    there = memory_limit(tmp_path)
    for limit, expected in ((str(2**30), 2**30), (str(there * 2), there), ("max", there)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory_limit(tmp_path) == expected


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path) -> None:
    for number, model in enumerate(("NVIDIA H200", "NVIDIA H200", "NVIDIA L4")):
        folder = tmp_path / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 3{number}\n")
    found = Machine("AMD EPYC", 16.0, 128 * 2**30, listed_gpus(tmp_path))
    assert found.describe() == "AMD EPYC, 16 cores, 128 GiB of memory, 2 x NVIDIA H200 and NVIDIA L4"
    assert Machine("", 1.0, 0, ()).describe() == "unknown processor, 1 core, no GPU"


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd sve bf16 i8mm\n", True),
        ("processor\t: 0\n", None),
        (None, None),
    ],
)
def test_products_in_bfloat16_are_known_by_the_flags_of_the_processor(
    cpuinfo: str | None, found: bool | None, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert multiplies_bf16(tmp_path) is found


def git(folder: Path, *arguments: str) -> None:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


def test_a_checkout_has_its_commit_and_says_if_it_was_modified(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    plain = code_version(package)
    assert "commit" not in plain
    git(tmp_path, "init")
    assert code_version(package) == plain  # in the folder of another project, as an environment is
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    assert code_version(package).startswith(f"{plain}, commit ")
    (tmp_path / "notes.txt").write_text("no part of the package")
    assert "modified" not in code_version(package)
    (package / "new.py").write_text("")
    assert code_version(package).endswith(", modified")


def test_the_command_can_be_typed_again_and_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "planted-secret-1 x")
    words = ["run", "my photos", "--out", "runs/mine", "out=s3://me:planted@host/x", "name=planted-secret-1 x"]
    shown = command_line(["/home/me/.venv/bin/grappa-dist", *words])
    assert shown.startswith("grappa-dist run 'my photos' --out runs/mine ")
    assert "planted" not in shown
    assert command_line([str(Path(machine.__file__).parents[1] / "__main__.py"), "run"]) == "grappa-dist run"
    assert command_line(["/x/launch/full_pipeline.py", "--config", "a.yaml"]).startswith(
        "python launch/full_pipeline.py"
    )
    assert command_line(["/usr/lib/python3/ipykernel_launcher.py", "-f", "/run/user/kernel.json"]) == ""
    assert len(command_line(["grappa-dist", "x" * 5000])) == machine.MOST_COMMAND


def test_what_a_run_records_has_no_name_of_host_or_user() -> None:
    found = origin()
    assert found["versions"]["torch"]
    assert "core" in found["machine"]
    for name in (socket.gethostname(), os.environ.get("USER", "")):
        assert len(name) < 3 or name not in str(found)
