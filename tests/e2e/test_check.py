"""The preflight alone, as a person calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from grappa_dist.distributed.preflight import versions
from tests.e2e import runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.long
def test_check_prints_what_the_nodes_have_and_makes_nothing(tmp_path: Path) -> None:
    ended = runs.run(tmp_path / "run", "--check", "resources.workers=1")
    assert ended.returncode == 0, ended.stderr
    (node, count) = ended.stdout.splitlines()
    assert ", ".join(f"{name} {version}" for name, version in versions().items()) in node
    assert count == "1 worker can start; 0 artefacts there and whole"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_check_refuses_what_does_not_fit_in_one_line(tmp_path: Path) -> None:
    ended: subprocess.CompletedProcess[str] = runs.run(tmp_path / "run", "--check", "resources.workers=9")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "error: 9 workers need 9 CPU, the Ray cluster has 2; lower resources.workers or resources.cpus_per_worker"
    ]


def test_check_compares_the_weights_that_a_worker_builds_with_those_of_the_driver(tmp_path: Path) -> None:
    odd = ("backbone.name=tests.models.odd:by_process", "backbone.image_size=32")
    ended = runs.run(tmp_path / "run", "--check", "resources.workers=1", *odd)
    assert ended.returncode == 2, ended.stderr
    (error,) = ended.stderr.splitlines()
    assert error.startswith("error: preflight: ")
    what = "the backbone is built with other weights than on the driver: model.patch_embed.linear.weight; does its"
    assert what in error
