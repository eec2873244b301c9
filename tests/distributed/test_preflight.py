from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.distributed import preflight
from grappa_dist.distributed.connection import check_answers
from grappa_dist.distributed.preflight import (
    Checks,
    Facts,
    answered,
    free_memory,
    problems,
    remarks,
    survey,
    token_in,
    versions,
)
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Runner

OURS = {"python": "3.11.7", "torch": "2.13.0"}
GIB = 2**30


def nothing() -> None:
    pass


def fail(error: Exception) -> None:
    raise error


def test_nodes_like_the_driver_have_no_problems() -> None:
    assert problems(OURS, [Facts("a", OURS, memory_bytes=GIB), Facts("b", dict(OURS), memory_bytes=GIB)], GIB) == []


def test_each_kind_of_problem_is_one_line_that_names_its_nodes() -> None:
    nodes = [
        Facts("a", OURS | {"torch": "2.10.0"}, memory_bytes=8 * GIB),
        Facts("b", OURS | {"torch": "2.10.0"}, storage="the run directory /runs is another", memory_bytes=8 * GIB),
        Facts("c", OURS | {"faiss": "missing"} | {"torch": "2.13.0"}, data="no shard", memory_bytes=GIB),
        Facts("d", OURS, gpu="torch sees no GPU"),
        Facts("e", OURS, backbone="the backbone is built with other weights", memory_bytes=8 * GIB),
    ]
    assert problems(OURS | {"faiss": "1.15.1"}, nodes, 2 * GIB) == [
        "a, b: torch 2.10.0, the driver has 2.13.0",
        "b: the run directory /runs is another",
        "c: faiss missing, the driver has 1.15.1",
        "c: no shard",
        "c: a worker needs 2.0 GiB of memory at least, 1.0 GiB is free",
        "d: torch sees no GPU",
        "e: the backbone is built with other weights",
    ]


def test_a_node_without_products_in_bfloat16_is_told_of_and_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fast in (False, None, True):
        monkeypatch.setattr(preflight, "multiplies_bf16", lambda fast=fast: fast)
        for bf16 in (False, True):
            checks = Checks(tmp_path, lambda: None, bf16=bf16)
            found.append(survey(checks, None, "n", f"{fast} {bf16}", workers=1, gpu=False))
    assert remarks(found) == [
        "False True: its processor has no matrix products in bfloat16, so backbone.precision=bf16 is slow there; fp32 "
        "is faster, and another result"
    ]
    assert problems(found[0].versions, found, 0) == []


def test_of_many_nodes_with_one_problem_a_few_are_named() -> None:
    nodes = [Facts(f"n{i}", OURS, data="no shard") for i in range(7)]
    assert problems(OURS, nodes, 0) == ["n0, n1, n2 and 4 more: no shard"]


def test_versions_are_those_that_would_be_imported_without_the_build() -> None:
    found = versions()
    assert list(found) == ["python", "torch", "ray", "deepspeed", "faiss", "grappa_dist"]
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["faiss"] == faiss.__version__


def test_other_sources_are_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_of(text: str) -> str:
        (tmp_path / "grappa_dist" / "distributed").mkdir(parents=True, exist_ok=True)
        (tmp_path / "grappa_dist" / "ops.py").write_text(text)
        monkeypatch.setattr(preflight, "__file__", str(tmp_path / "grappa_dist" / "distributed" / "preflight.py"))
        return preflight._own_version()

    assert digest_of("a = 1") == digest_of("a = 1") != digest_of("a = 2")


def test_what_an_editor_leaves_beside_the_sources_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grappa_dist" / "distributed").mkdir(parents=True)
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "grappa_dist" / "distributed" / "preflight.py"))
    (tmp_path / "grappa_dist" / "ops.py").write_text("a = 1")
    before = preflight._own_version()
    (tmp_path / "grappa_dist" / ".#ops.py").symlink_to("me@host.123:456")
    assert preflight._own_version() == before


def test_two_nodes_on_one_host_answer_each_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LATE_FILE_S", 0.0)
    with token_in(tmp_path) as token:
        facts = survey(Checks(tmp_path, nothing), token, "first", "host", workers=1, gpu=False)
        assert answered(token, "first", facts).storage == ""
        assert "the driver does not see" in answered(token, "second", facts).storage


def test_files_in_the_page_cache_take_no_memory_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 800\ninactive_file 700\nactive_file 100\n")
    assert preflight._left_in_container(tmp_path) == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight._left_in_container(tmp_path) > 2**60


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_head_of_ipv6_answers() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        check_answers(f"[::1]:{server.getsockname()[1]}")


def test_a_node_that_shares_everything_has_no_problem(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "new"
    with token_in(root) as token:
        facts = survey(Checks(root, nothing), token, "id", "here", workers=2, gpu=False)
        assert answered(token, "id", facts) == facts
        assert (facts.storage, facts.data, facts.gpu) == ("", "", "")
        assert 0 < facts.memory_bytes <= free_memory()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_uses_meanwhile_stays(tmp_path: Path) -> None:
    with token_in(tmp_path / "runs" / "new"):
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_node_with_a_separate_run_directory_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LATE_FILE_S", 0.0)
    with token_in(tmp_path / "drivers") as token:
        elsewhere = tmp_path / "nodes" / token.name
        facts = survey(Checks(tmp_path / "nodes", nothing), elsewhere, "id", "far", workers=1, gpu=False)
        assert "is not the one that the driver writes to" in facts.storage
        assert answered(token, "id", facts) == facts


def test_what_only_the_node_sees_of_its_own_writing_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "LATE_FILE_S", 0.0)
    with token_in(tmp_path) as token:
        overlay = tmp_path / "overlay"  # reads what the driver wrote, keeps what it writes
        overlay.mkdir()
        (overlay / "driver").write_text((token / "driver").read_text())
        facts = survey(Checks(tmp_path, nothing), overlay, "id", "far", workers=1, gpu=False)
        assert facts.storage == ""
        assert "the driver does not see" in answered(token, "id", facts).storage


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_run_directory_that_a_node_may_not_write_is_found_out(tmp_path: Path) -> None:
    with token_in(tmp_path) as token:
        for folder in (token, *token.parents):
            if folder.is_relative_to(tmp_path.parents[1]):
                folder.chmod(0o755)
        (token / "driver").chmod(0o644)
        os.seteuid(65534)
        try:
            facts = survey(Checks(tmp_path, nothing), token, "id", "far", workers=1, gpu=False)
        finally:
            os.seteuid(0)
    assert facts.storage == f"the run directory {tmp_path} cannot be used: Permission denied"


def test_a_run_directory_that_cannot_be_made_is_an_error_of_the_driver(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"the run directory .*file/run cannot be written: Not a directory"),
        token_in(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (partial(fail, FileNotFoundError(2, "No such file or directory", "/data/a.tar")), "'/data/a.tar'"),
        (partial(fail, ValueError("s3://bucket/a.tar:\n  no credentials")), "s3://bucket/a.tar: no credentials"),
        (partial(fail, ModuleNotFoundError("No module named 's3fs'")), "No module named 's3fs'"),
    ],
)
def test_data_that_a_node_cannot_read_is_one_line(tmp_path: Path, read: Callable[[], None], message: str) -> None:
    with token_in(tmp_path) as token:
        facts = survey(Checks(tmp_path, read), token, "id", "far", workers=1, gpu=False)
    assert facts.data.startswith("images cannot be read: ")
    assert message in facts.data
    assert "\n" not in facts.data


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_found_out(tmp_path: Path) -> None:
    with token_in(tmp_path) as token:
        facts = survey(Checks(tmp_path, nothing), token, "id", "far", workers=1, gpu=True)
    assert "sees no GPU here, though Ray has given one" in facts.gpu


def read_unless(flag: Path) -> None:
    if flag.exists():
        raise FileNotFoundError(f"{flag} is in the way")


@pytest.mark.slow
def test_a_node_that_does_not_pass_stops_the_run_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Ray of one worker that is started for this."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resources, flag = Resources(workers=1, num_cpus=1), tmp_path / "flag"
    flag.touch()
    cluster = Cluster(resources, Checks(tmp_path / "run", partial(read_unless, flag)))
    try:
        with pytest.raises(ValueError, match=r"^preflight: .+: images cannot be read: .+flag is in the way$"):
            Runner(cluster, resources).map(print, [1])
    finally:
        cluster.close()
