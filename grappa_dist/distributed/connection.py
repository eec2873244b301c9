"""Connects to Ray: to the one that RAY_ADDRESS names, or to one of the run's own that it starts on this machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Terminated
from grappa_dist.distributed import local_ray
from grappa_dist.distributed.local_ray import LocalRay
from grappa_dist.extras import RUNS, require

CONNECT_TIMEOUT_S = 5.0
GREETING_S = 2.0
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
CLIENT = "ray://"
EXPECTED = (
    "expected <host>:<port> of the head, as `ray start --head` prints it (port 6379 by default), "
    "or nothing for a Ray of this run's own"
)
TOKEN_WANTED = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the token that the cluster was "
    "started with"
)
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)  # the first words of a client, no settings
_SETTINGS = 4  # the kind of frame that a server of HTTP/2 begins with


def connect(resources: Resources, log: Callable[[str], None] = lambda text: None) -> LocalRay | None:
    """Connects unless that is done; the local Ray that it has started.

    Raises:
        ValueError: a package is not installed; RAY_ADDRESS is not an address, nothing answers there, it runs other
            versions of Ray or Python, or wants a token.
        RuntimeError: a local Ray did not start.
        Terminated: SIGTERM or Ctrl-C came meanwhile.
    """
    require(*RUNS)
    import ray

    if ray.is_initialized():
        return None
    handler = signal.getsignal(signal.SIGTERM)  # ray.init installs its own
    try:
        if is_local(os.environ.get("RAY_ADDRESS", "")):
            settings = {**_quiet(), "job_config": _importing_as_here(ray)}
            return local_ray.start(ray, resources.num_cpus, log, **settings)
        _join(ray, os.environ["RAY_ADDRESS"])
        return None
    except SystemExit:  # raised by Ray's own handler
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def is_connected() -> bool:
    """Whether this process is connected to a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def is_local(address: str) -> bool:
    """Whether RAY_ADDRESS asks for a Ray of the run's own."""
    return address in ("", "local")


def check_answers(address: str) -> None:
    """Raises ValueError when address is not host:port, or no Ray listens there; Ray itself would wait for minutes."""
    if address == "auto":
        return
    scheme, mark, _ = address.partition("://")
    if mark and not address.startswith(CLIENT):
        what = "is that of a dashboard, for `ray job submit`" if scheme.startswith("http") else "has an unknown scheme"
        raise ValueError(f"RAY_ADDRESS={address} {what}; {EXPECTED}")
    host, colon, port = address.removeprefix(CLIENT).rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"RAY_ADDRESS={address}: {EXPECTED}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S) as connection:
            answer = _first_words(connection)
    except socket.gaierror as error:
        raise ValueError(f"RAY_ADDRESS={address}: no machine is known as {host} ({error.strerror})") from None
    except OSError as error:
        raise ValueError(f"RAY_ADDRESS={address} does not answer: {error.strerror or error}") from None
    if answer is not None and answer[3:4] != bytes([_SETTINGS]):
        raise ValueError(f"RAY_ADDRESS={address}: what listens there is not Ray's head; {EXPECTED}")


def _first_words(connection: socket.socket) -> bytes | None:
    """How a server of HTTP/2, as Ray's are, answers a greeting; None for silence, and where TLS would come first."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return None
    connection.settimeout(GREETING_S)
    try:
        connection.sendall(_HTTP2)
        return connection.recv(9)
    except TimeoutError:  # it may be busy
        return None
    except OSError:  # it has hung up
        return b""


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}


class _Kept(list[str]):
    """A list to which Ray adds nothing: it would put the current directory before everything else."""

    def extend(self, _: Iterable[str]) -> None:
        pass


def import_path() -> list[str]:
    """Where this process finds modules, in order; "" by the name of the current directory."""
    return list(dict.fromkeys(os.path.abspath(path) for path in sys.path))


def _importing_as_here(ray: Any) -> Any:
    """Settings of a job whose workers import from where this process does, in the same order."""
    return ray.job_config.JobConfig(_py_driver_sys_path=_Kept(reversed(import_path())))  # each is put before the last


def _join(ray: Any, address: str) -> None:
    check_answers(address)
    settings: dict[str, Any] = {"job_config": _importing_as_here(ray)}
    if address.startswith(CLIENT):  # its server has no such settings
        settings = {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(import_path())}}}
    local_ray.read_authentication()
    try:
        ray.init(address=address, **settings, **_quiet())
    except (RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        raise _explained(address, error) from error


def _explained(address: str, error: Exception) -> Exception:
    """An error of joining that the user can mend as a ValueError, any other as it is."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if "AuthToken" in text or "uthentication" in text:
        given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        how = "refuses the token of this environment" if given else "wants a token, and this environment has none"
        return ValueError(f"RAY_ADDRESS={address} {how}; {TOKEN_WANTED}")
    if "ersion mismatch" in text:
        return ValueError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}")
    if address == "auto":
        return ValueError(f"RAY_ADDRESS=auto: no Ray runs on this machine, or it does not answer; {EXPECTED}")
    if isinstance(error, ConnectionError):
        return ValueError(f"RAY_ADDRESS={address}: what listens there does not answer as Ray's head does; {EXPECTED}")
    return error
