"""Compiles guard.cpp by this machine's compiler, once for each torch, and loads it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
FOLDER = Path(__file__).parents[2] / "build" / "pretend_gpu"
_LIBRARIES = ("libgomp.so.1", "libc10.so", "libtorch_cpu.so")  # whose symbols the guard needs


def compiler() -> str | None:
    """The path of a C++ compiler; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


def why_not() -> str:
    """Why there can be no pretend GPU on this machine; "" where there can."""
    return "" if compiler() else "no C++ compiler is here (c++, g++ or clang++): NOTHING OF THE GPU CODE IS TESTED"


def build() -> Path:
    """The compiled guard, made on the first call for this source and this torch; other processes wait for it.

    Raises:
        RuntimeError: the compiler fails, with what it says.
    """
    key = hashlib.sha256(f"{version('torch')} {_torch()}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / f"guard-{key}.so"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            fresh = library.with_suffix(".partial")
            asked = [sys.executable, "-c", "import torch; print(int(torch.compiled_with_cxx11_abi()))"]
            abi = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
            flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
            command = [str(compiler()), *flags, f"-I{_torch() / 'include'}", str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{compiler()} does not compile {SOURCE}:\n{done.stderr[-4000:]}")
            fresh.rename(library)
    return library


def install() -> None:
    """Lets this process take "cuda:0" for a device, until it ends. To be called before torch is imported, which looks
    for a GPU once."""
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported, and has found no GPU: the pretend one comes first")
    library = build()
    for name in _LIBRARIES:
        if (path := _torch() / "lib" / name).exists():
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).install_guard()


def _torch() -> Path:
    """The folder of torch, which is not imported for it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
