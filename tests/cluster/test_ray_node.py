"""cluster/ray_node.py without a Ray: what it refuses, what it removes, which address it takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import ray_node
from tests.e2e.runs import ROOT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--object-store", "1000G"], "does not fit"),
        (["--object-store", "much"], "--object-store=much must be a number of bytes"),
        (["--interface", "nosuch0"], "interface nosuch0 has no IPv4 address"),
        (["--temp-dir", f"/tmp/{'x' * 40}"], "at most 40 characters"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(flags: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "cluster" / "ray_node.py"), "--cpus", "1", "--temp-dir", "/tmp/never", *flags]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "node: failed=" in ended.stdout
    assert not Path("/tmp/never").exists()


def test_only_folders_that_no_process_has_locked_are_removed(tmp_path: Path) -> None:
    held = ray_node.make_folder(tmp_path / "grappa-1")
    os.close(ray_node.make_folder(tmp_path / "grappa-2"))  # its process has ended
    os.close(ray_node.make_folder(tmp_path / "grappa-3"))  # likewise, just now
    (tmp_path / "grappa-4").mkdir()  # not of ours: it has no lock
    for number in (1, 2, 4):
        os.utime(tmp_path / f"grappa-{number}", (time.time() - 100,) * 2)
    ray_node.remove_stale(tmp_path / "grappa-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grappa-1", "grappa-3", "grappa-4"]
    os.close(held)


def test_folders_are_private_to_their_owner_and_all_made_or_none(tmp_path: Path) -> None:
    ray_node.make_folders([tmp_path / "grappa-1", tmp_path / "spill" / "n1-grappa-1"])
    assert [oct((tmp_path / f).stat().st_mode)[-3:] for f in ("grappa-1", "spill/n1-grappa-1")] == ["700"] * 2
    with pytest.raises(FileExistsError):
        ray_node.make_folders([tmp_path / "grappa-2", tmp_path / "spill" / "n1-grappa-1"])
    assert not (tmp_path / "grappa-2").exists()


def test_nothing_stays_below_the_spill_folder(tmp_path: Path) -> None:
    temp_dir = Path(f"/tmp/gn{os.getpid()}")
    touch = 'for i; do case $i in *spilling*) touch "${i#*=}/x"; esac; done'
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@"\nstat -c mode=%a {temp_dir}\n{touch}\n')
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)  # beside which a node looks for its ray
    command = [str(tmp_path / "python"), str(ROOT / "cluster" / "ray_node.py"), "--cpus", "1", "--object-store", "1M"]
    command += ["--temp-dir", str(temp_dir), "--spill-dir", str(tmp_path / "spill"), "--interface", "lo"]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert f"--object-spilling-directory={tmp_path}/spill/{socket.gethostname()}-{temp_dir.name}" in ended.stdout
    assert f"--temp-dir={temp_dir}/r " in ended.stdout  # Ray opens that one to all users
    assert "mode=700" in ended.stdout
    assert list((tmp_path / "spill").iterdir()) == []
    assert not temp_dir.exists()


def test_the_interface_of_an_address_is_found_by_name() -> None:
    assert dict(ray_node.interfaces())["lo"] == "127.0.0.1"
    assert ray_node.interface_of("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert ray_node.interface_of("198.51.100.1") == {}


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ray_node.free_port(port) > port
