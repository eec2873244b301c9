"""The connection to Ray: the cluster of RAY_ADDRESS, or a local one that is ours."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from grappa_dist.config import Resources
from grappa_dist.console import Terminated

CONNECT_TIMEOUT_S = 5.0
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`


def check_faiss() -> None:
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("faiss is not installed; install grappa-dist[cpu], or grappa-dist[gpu] where there are GPUs")


def check_answers(address: str) -> None:
    """Raises ValueError when nobody listens at host:port, which Ray itself would wait minutes for."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ValueError(f"RAY_ADDRESS={address} does not answer: {error.strerror or error}") from None


def connect(resources: Resources) -> Path | None:
    """Connects unless that is done; the temporary folder of a local cluster, which is ours to end.

    Raises:
        ValueError: nobody answers at RAY_ADDRESS, or it runs other versions of Ray or Python.
        Terminated: SIGTERM or Ctrl-C came meanwhile.
    """
    import ray

    if ray.is_initialized():
        return None
    check_faiss()
    handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in place
    try:
        if not os.environ.get("RAY_ADDRESS"):
            return _start(ray, resources)
        _join(ray)
        return None
    except SystemExit:  # of Ray's own handler
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}


def _paths() -> str:
    return os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path if "site-packages" not in p))


def _join(ray: Any) -> None:
    submitted = SUBMITTED_JOB in os.environ  # then its runtime environment is set, and its folder importable
    environment = None if submitted else {"env_vars": {"PYTHONPATH": _paths()}}
    check_answers(os.environ["RAY_ADDRESS"])
    try:
        ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=environment, **_quiet())
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ValueError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {' '.join(str(error).split())}") from None


def _start(ray: Any, resources: Resources) -> Path:
    # Without this Ray writes a token that later clusters of this user want.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["PYTHONPATH"] = _paths()
    owned = Path(tempfile.mkdtemp(prefix="grappa-", dir="/tmp"))  # short: sockets live in it
    try:
        ray.init(
            address="local",
            num_cpus=resources.num_cpus,
            include_dashboard=False,
            object_store_memory=2**28,  # big arrays go through storage
            _temp_dir=str(owned),
            **_quiet(),
        )
    except BaseException:  # a signal may come meanwhile
        shutil.rmtree(owned, ignore_errors=True)
        raise
    return owned
