"""What the machine has: findings, what they mean, and whether they stop runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from grappa_dist import doctor
from grappa_dist.doctor import Finding, describe, examine, versions


def test_every_line_of_this_machine_has_a_name_a_state_and_what_was_found(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in examine(tmp_path / "not" / "yet" / "there")}
    assert {"Python", "torch", "GPU", "NCCL", "Ray", "DeepSpeed", "faiss", "JPEG", "formats", "HEIC"} <= findings.keys()
    assert {"parquet", "cores", "memory", "/dev/shm", "runs", "TMPDIR", "open files"} <= findings.keys()
    installed = ("Python", "torch", "DeepSpeed", "faiss", "JPEG", "HEIC", "parquet")
    assert {findings[name].state for name in installed} == {"ok"}
    assert findings["DeepSpeed"].found.startswith(metadata.version("deepspeed"))
    assert all(finding.found for finding in findings.values())
    assert not (tmp_path / "not").exists()


def test_an_address_that_does_not_answer_stops_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # discard
    (ray,) = doctor._ray(start_ray=False)
    assert ray.stops_runs
    assert ray.means == "RAY_ADDRESS=127.0.0.1:9 does not answer: Connection refused"


def test_a_package_that_is_missing_has_its_install_line_and_one_that_fails_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (parquet,) = doctor._parquet()
    assert (parquet.state, parquet.means) == ("missing", "pip install 'grappa-dist[parquet]'")
    monkeypatch.delitem(sys.modules, "pyarrow")
    (tmp_path / "pyarrow.py").write_text("raise ImportError('libarrow.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    (parquet,) = doctor._parquet()
    assert (parquet.state, parquet.found) == (
        "missing",
        "installed, but its import fails: libarrow.so: cannot open shared object file",
    )


def test_the_last_line_says_whether_runs_are_possible() -> None:
    good, little = Finding("torch", "ok", "2.13.0"), Finding("memory", "warning", "1 MiB free", "little")
    assert describe([good]) == "ok       torch  2.13.0\nRuns are possible here."
    assert describe([good, little]).splitlines()[1:] == [
        "warning  memory  1 MiB free; little",
        "Runs are possible here, with 1 warning.",
    ]
    stopped = Finding("Ray", "missing", "not installed", "runs need it", stops_runs=True)
    assert describe([stopped, little]).endswith("No run is possible here as it is: Ray. See above.")


def test_versions_are_those_of_the_metadata_and_import_nothing() -> None:
    found = versions("1.2.3")
    assert found["torch"].startswith(f"{metadata.version('torch')} (built ")
    assert found["faiss"] == f"{metadata.version('faiss-cpu')} (faiss-cpu)"
    assert found["grappa-dist"] == (f"1.2.3 ({Path(doctor.__file__).parent})")
    code = (
        "import sys; from grappa_dist.doctor import versions; versions(''); "
        "sys.exit(bool({'torch', 'numpy', 'ray', 'faiss', 'PIL'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_what_ends_a_look_is_a_finding_and_the_other_looks_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def imported(name: str) -> ModuleType:
        if name == "ray":
            raise TypeError("Descriptors cannot be created directly")
        return real(name)

    def none() -> None:
        raise RuntimeError("no memory here")

    monkeypatch.setattr(importlib, "import_module", imported)
    monkeypatch.setattr("grappa_dist.distributed.preflight.free_memory", none)
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert found["Ray"].stops_runs
    assert "Descriptors cannot be created" in found["Ray"].found
    assert (found["memory"].state, found["memory"].found) == ("warning", "no memory here")
    assert {"open files", "cores"} <= found.keys()


def test_a_machine_without_a_c_compiler_or_headers_is_told_what_it_does_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "bin" / "gcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(compiler.parent))
    assert doctor._compiler() == Finding("C compiler", "ok", str(compiler))
    monkeypatch.setenv("CC", "icc")
    assert (doctor._compiler().state, doctor._compiler().found) == ("warning", "none: CC is icc")
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    assert doctor._compiler().found == f"no {tmp_path / 'Python.h'}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler().found == "none: neither gcc nor clang"
    assert "the fused kernel of k-means and torch.compile need one" in doctor._compiler().means
