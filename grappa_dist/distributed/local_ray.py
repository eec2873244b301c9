"""A Ray of the run's own on this machine: it listens on the loopback alone, asks for a token, and ends with the run."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa_dist.distributed import leftovers
from grappa_dist.storage import described

LOOPBACK = "127.0.0.1"
LONGEST_SOCKET = 107  # characters of a socket's path; the system's limit
BELOW_FOLDER = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
PARTS = ("gcs_server", "raylet")  # the processes without which it is of no use
OBJECT_STORE_BYTES = 2**28  # big arrays go through storage
LOG_BYTES = 32 * 2**20
NICENESS = 5  # of workers, added to that of the run
TOO_SLOW = re.compile("timed out|deadline exceeded", re.IGNORECASE)  # what Ray says of processes of its own


@dataclass(frozen=True)
class LocalRay:
    """A running one."""

    folder: Path  # of its logs, sockets and token; no other user may enter
    _watcher: subprocess.Popen[bytes]
    _lock: int

    def dead(self) -> str:
        """Which of its processes has died, or "". Ray's agents end its raylet when they die."""
        import ray

        node = ray._private.worker._global_node
        return "" if node is None else next((name for name, _ in node.dead_processes() if name in PARTS), "")

    def end(self) -> None:
        """Ends it and removes its folder, whatever has died of it."""
        import ray

        ray.shutdown()
        leftovers.remove(self.folder, sparing=[self._watcher.pid])
        self._watcher.kill()
        self._watcher.wait()
        os.close(self._lock)


def start(ray: Any, num_cpus: int | None, log: Callable[[str], None], **settings: Any) -> LocalRay:
    """Starts one and connects to it. Ray waits half a minute for its own processes; once more on a busy machine.

    Args:
        num_cpus: that Ray is to believe in; None: those of the machine.
        log: called when it is tried again, when the folder is not below TMPDIR, and when Ray does not listen on the
            loopback alone.
        settings: of `ray.init`.

    Raises:
        ValueError: there is no place for its folder.
        RuntimeError: it did not start.
    """
    try:
        return _started(ray, num_cpus, log, settings)
    except RuntimeError as error:
        if not TOO_SLOW.search(str(error.__cause__)):
            raise
        log(f"warning: {error}; trying once more")
        return _started(ray, num_cpus, log, settings)


def _started(ray: Any, num_cpus: int | None, log: Callable[[str], None], settings: Mapping[str, Any]) -> LocalRay:
    folder, lock = _folder(log)
    local = LocalRay(folder, _watcher(folder), lock)
    try:
        _write_token(folder)
        with _environment(_variables(folder)), _held_back(signal.SIGHUP), _loopback(ray):
            read_authentication()
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder / "r"),  # which Ray opens to all users; they cannot enter the one above it
                **settings,
            )
    except BaseException as error:
        local.end()
        if not isinstance(error, Exception):  # a signal
            raise
        said = str(described(error)).strip() or type(error).__name__
        raise RuntimeError(f"Ray did not start on this machine: {said.splitlines()[-1]}") from error
    address = ray.get_runtime_context().gcs_address
    if not address.startswith(LOOPBACK + ":"):
        log(f"warning: Ray {ray.__version__} listens on {address}, not on {LOOPBACK} alone; a token guards it")
    return local


def _watcher(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", leftovers.__file__, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the run's group is not for it
    )


def read_authentication() -> None:
    """Lets Ray read its mode and token from the environment again: this process keeps those of its last cluster."""
    import ray

    core: Any = ray._raylet
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


def _folder(log: Callable[[str], None]) -> tuple[Path, int]:
    """A folder for Ray, with its lock: below TMPDIR, or else where a short name can be had. Those of dead runs go."""
    first = Path(tempfile.gettempdir())
    others = [os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"]
    refused = []
    for parent in dict.fromkeys([first, *(Path(other) for other in others if other)]):
        leftovers.sweep(parent)
        longest = LONGEST_SOCKET - BELOW_FOLDER - len(f"/{leftovers.PREFIX}12345678")
        if len(os.fsencode(parent)) > longest:
            refused.append(f"{parent} has more than {longest} characters, and Ray's sockets lie far below")
            continue
        try:
            made = leftovers.make_folder(parent)
        except OSError as error:
            refused.append(f"{parent}: {error.strerror}")
            continue
        if refused:
            log(f"Ray's folder is {made[0]}: {'; '.join(refused)}")
        return made
    raise ValueError(f"TMPDIR={first}: no place for Ray's folder ({'; '.join(refused)}); name a short one to write to")


def _write_token(folder: Path) -> None:
    handle = os.open(folder / leftovers.TOKEN, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


def _variables(folder: Path) -> dict[str, str | None]:
    """What Ray's processes find in their environment; None: not there."""
    found: dict[str, str | None] = {
        "RAY_AUTH_MODE": "token",
        leftovers.TOKEN_VARIABLE: str(folder / leftovers.TOKEN),
        "RAY_AUTH_TOKEN": None,  # would be used instead
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": os.environ.get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # see _loopback
        # Else Ray ends this process 60 s after its GCS has died, though another Ray may be started
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        # Beside a busy process of nice 0, 5 leaves a quarter of a core; Ray's own default, 15, leaves 3 %
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", str(NICENESS)),  # noqa: SIM112 - Ray's name
        # Of each log, and one older part of it; without a bound Ray does not rotate what workers print
        "RAY_ROTATION_MAX_BYTES": os.environ.get("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES)),
        "RAY_ROTATION_BACKUP_COUNT": os.environ.get("RAY_ROTATION_BACKUP_COUNT", "1"),
        # Else `ray.init` waits for one idle process per CPU; the workers of a run have another environment and use none
        "RAY_prestart_worker_first_driver": os.environ.get("RAY_prestart_worker_first_driver", "false"),  # noqa: SIM112
    }
    if sys.platform == "linux":  # the ranks' sockets, likewise
        found |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    return found


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """While inside, these are set: processes that start meanwhile have them, later ones of this program do not."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """While inside, the signal waits; processes that start meanwhile never get it.

    A closed terminal hangs up on its whole group: workers and Ray must live until they have saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """While inside, Ray takes 127.0.0.1 for this machine's address, as it does by itself where it has no clusters.

    Otherwise it replaces a loopback address that it is given, and all its servers then listen on all interfaces.
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
