from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grappa_dist.config import Resources
from grappa_dist.distributed import connection
from grappa_dist.distributed.connection import check_answers, import_path


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """An address at which each connection is answered with these bytes, or closed at once if there are none."""

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            with peer:
                if answer:
                    peer.recv(100)
                    peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.1:8265", "that of a dashboard, for `ray job submit`; expected <host>:<port>"),
        ("https://head/", "that of a dashboard"),
        ("tcp://head:6379", "an unknown scheme"),
        ("head", "expected <host>:<port> of the head"),
        (":6379", "expected <host>:<port>"),
        ("head:", "expected <host>:<port>"),
        ("head:ray", "expected <host>:<port>"),
        ("head:66379", "expected <host>:<port>"),
        ("ray://head", "expected <host>:<port>"),
        ("nowhere.invalid:6379", "no machine is known as nowhere.invalid"),
        ("127.0.0.1:1", "does not answer: Connection refused"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_with_what_would_be(address: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_answers(address)
    assert str(refused.value).startswith(f"RAY_ADDRESS={address}")
    assert message in str(refused.value)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_what_does_not_speak_as_ray_does_is_not_taken_for_its_head(answer: bytes) -> None:
    with server(answer) as address, pytest.raises(ValueError, match="what listens there is not Ray's head"):
        check_answers(address)


def test_a_server_of_ray_s_protocol_is_taken_for_its_head() -> None:
    with server(b"\0\0\0\4\0\0\0\0\0") as address:
        check_answers(address)
        check_answers(f"ray://{address}")


class RayError(Exception):
    pass


def failing(error: Exception) -> Any:
    """A stand-in for Ray that cannot be joined."""

    def init(**_: object) -> None:
        raise error

    return SimpleNamespace(
        init=init,
        exceptions=SimpleNamespace(RayError=RayError),
        job_config=SimpleNamespace(JobConfig=lambda _py_driver_sys_path: list(_py_driver_sys_path)),
    )


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        ("", RayError("RPC error: InvalidAuthToken: Authentication token is missing"), "wants a token"),
        ("wrong", RayError("RPC error: InvalidAuthToken"), "refuses the token of this environment"),
        ("", RuntimeError("Version mismatch: the cluster has Ray 2.50"), "Version mismatch: the cluster has Ray 2.50"),
        ("", ConnectionError("Failed to connect to Ray cluster"), "does not answer as Ray's head does"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named_with_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, token: str, error: Exception, message: str
) -> None:
    monkeypatch.setattr(connection, "check_answers", lambda address: None)
    monkeypatch.setattr(connection.local_ray, "read_authentication", lambda: None)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ValueError, match=message) as refused:
        connection._join(failing(error), "head:6379")
    assert str(refused.value).startswith("RAY_ADDRESS=head:6379")


def test_another_failure_to_join_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "check_answers", lambda address: None)
    monkeypatch.setattr(connection.local_ray, "read_authentication", lambda: None)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        connection._join(failing(RuntimeError("no memory")), "head:6379")


def test_workers_import_in_the_order_of_this_process_and_from_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/first", "", "/second", "/first"])
    assert import_path() == ["/first", os.fspath(tmp_path), "/second"]
    given = connection._Kept(reversed(import_path()))
    given.extend(["/the/current/directory"])  # as Ray does
    path = ["/of/the/interpreter"]
    for entry in given:
        path.insert(0, entry)
    assert path == [*import_path(), "/of/the/interpreter"]


@pytest.mark.parametrize("address", ["", "local"])
def test_no_address_means_a_ray_of_this_machine(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    ray, started = pytest.importorskip("ray"), []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.local_ray, "start", lambda ray, num_cpus, log, **settings: started.append(num_cpus))
    connection.connect(Resources(num_cpus=3))
    assert started == [3]
