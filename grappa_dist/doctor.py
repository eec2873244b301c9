"""Looks at this machine: what is installed, what it has, and what that means for runs. Changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

from grappa_dist.console import format_bytes, one_line, pluralize
from grappa_dist.distributed.machine import usable_cores
from grappa_dist.extras import install_line
from grappa_dist.storage import MOST_OPEN_FILES

State = Literal["ok", "warning", "missing"]
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss")  # distributions of one module
REPORTED = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "ray", "deepspeed")
LITTLE_DISK, LITTLE_MEMORY, FEW_FILES = 5 * 2**30, 2 * 2**30, 2**12


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    means: str = ""  # what follows from it; of a missing package how it is installed
    stops_runs: bool = False  # whether no run is possible as it is


def versions(own: str) -> dict[str, str]:
    """What a bug report needs: versions of packages, read from their metadata alone, of Python and of the machine.

    Args:
        own: the version of this package.
    """
    found = {"grappa-dist": f"{own} ({Path(__file__).parent})"}
    found["python"] = f"{platform.python_version()} ({sys.executable})"
    for name in REPORTED:
        found[name] = _version(name) or "not installed"
    found["torch"] += _torch_build()
    faiss = faiss_distribution()
    found["faiss"] = f"{_version(faiss)} ({faiss})" if faiss else "not installed"
    found["CUDA"] = _driver() or "no NVIDIA driver"
    found["platform"] = platform.platform()
    return found


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def faiss_distribution() -> str:
    """Which of the distributions of faiss is installed, or ""."""
    return next((name for name in FAISS if _version(name)), "")


def _torch_build() -> str:
    """What torch is built for, from a file of it: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return f" (built for CUDA {cuda[1]})" if cuda else " (built without CUDA)"


def _driver() -> str:
    """NVIDIA's driver of this machine, or ""."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"(\d+\.\d+(\.\d+)?)", path.read_text(encoding="utf-8")) if path.is_file() else None
    return f"NVIDIA driver {found[1]}" if found else ""


def examine(out: Path, *, start_ray: bool = False) -> list[Finding]:
    """Everything that was found, in the order of its importance.

    Args:
        out: where runs would go.
        start_ray: whether a Ray of this machine's own is started and ended again, which takes some ten seconds.
    """
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "torch": _torch,
        "GPUs": _gpus,
        "Ray": lambda: _ray(start_ray=start_ray),
        "DeepSpeed": _deepspeed,
        "faiss": _faiss,
        "decoders": _decoders,
        "formats": _formats,
        "parquet": _parquet,
        "stores": _stores,
        "weights": _weights,
        "cores": _cores,
        "memory": _memory,
        "/dev/shm": _shared_memory,
        "disk": lambda: _disk(out),
        "open files": _open_files,
    }
    return [finding for name, look in looks.items() for finding in _looked(name, look)]


def _looked(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds; what ends it, such as a package that is broken in a way of its own, is a finding too."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(name, "warning", one_line(error), "this could not be looked at")


def describe(findings: Sequence[Finding]) -> str:
    """A line per finding, and one that says whether runs are possible."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        means = f"; {finding.means}" if finding.means else ""
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.found}{means}")
    if stopping := [finding.name for finding in findings if finding.stops_runs]:
        lines.append(f"No run is possible here as it is: {', '.join(stopping)}. See above.")
    else:
        warnings = sum(finding.state == "warning" for finding in findings)
        lines.append("Runs are possible here" + (f", with {pluralize(warnings, 'warning')}." if warnings else "."))
    return "\n".join(lines)


def _imported(name: str, module: str, needed: str = "") -> ModuleType | Finding:
    """A module, or why it cannot be imported: it is not there, or a library that it needs is not.

    Args:
        needed: what is not possible without it, where that is every run.
    """
    try:
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
    except Exception as error:  # not ImportError alone: protobuf, for one, raises TypeError
        why = " ".join(str(error).split())
        return Finding(name, "missing", f"installed, but its import fails: {why}", needed, bool(needed))
    how = install_line(module)
    return Finding(name, "missing", "not installed", f"{needed + ': ' if needed else ''}{how}", bool(needed))


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "missing", f"its import fails: {' '.join(str(error).split())}", "", True)
        return
    yield Finding("torch", "ok", f"{torch.__version__}{_torch_build()}, {pluralize(torch.get_num_threads(), 'thread')}")


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("GPU", "ok", f"{index}: {name}, {format_bytes(free)} of {format_bytes(total)} free")
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
        yield _compiler()
        return
    if driver := _driver():
        built = "was built without CUDA: install a build with it" if torch.version.cuda is None else "cannot use it"
        yield Finding("GPU", "warning", f"{driver}, but torch sees no GPU", f"torch {built}; runs use the CPU")
    else:
        yield Finding("GPU", "ok", "none", "runs use the CPU; `grappa-dist plan` says how long they take")
    yield Finding("NCCL", "ok", "not needed without GPUs", "workers exchange tensors by gloo")


def _compiler() -> Finding:
    """What Triton builds the start of its kernels with, on a machine with GPUs."""
    asked = os.environ.get("CC", "")
    found = next((path for name in ([asked] if asked else ["gcc", "clang"]) if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if found and headers.is_file():
        return Finding("C compiler", "ok", found)
    absent = f"no {headers}" if found else f"none: CC is {asked}" if asked else "none: neither gcc nor clang"
    means = "the fused kernel of k-means and torch.compile need one, with Python's headers, and are off"
    return Finding("C compiler", "warning", absent, means)


def _ray(*, start_ray: bool) -> Iterator[Finding]:
    module = _imported("Ray", "ray", "runs need it")
    if isinstance(module, Finding):
        yield module
        return
    address, found = os.environ.get("RAY_ADDRESS", ""), _version("ray")
    from grappa_dist.distributed.connection import check_answers

    if address not in ("", "local"):
        try:
            check_answers(address)
        except ValueError as error:
            yield Finding("Ray", "warning", found, str(error), True)
        else:
            yield Finding("Ray", "ok", found, f"RAY_ADDRESS={address} answers; runs use that cluster")
        return
    if not start_ray:
        yield Finding("Ray", "ok", found, "a run starts one on this machine (not tried; --start-ray tries it)")
        return
    yield _started_ray(found)


def _started_ray(found: str) -> Finding:
    from grappa_dist.config import Resources
    from grappa_dist.distributed.connection import connect

    try:
        local = connect(Resources())
    except (ValueError, RuntimeError) as error:
        return Finding("Ray", "warning", found, str(error), True)
    if local is not None:
        local.end()
    return Finding("Ray", "ok", found, "starts on this machine")


def _deepspeed() -> Iterator[Finding]:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        yield Finding("DeepSpeed", "missing", "not installed", f"runs need it: {install_line('deepspeed')}", True)
        return
    installed = Path(spec.origin).with_name("git_version_info_installed.py")
    text = installed.read_text(encoding="utf-8") if installed.is_file() else ""
    built = re.findall(r"'(\w+)': True", text)
    operators = f"operators built: {', '.join(built)}" if built else "none of its operators is built"
    yield Finding("DeepSpeed", "ok", f"{_version('deepspeed')}, {operators}", "runs use none, so nothing is compiled")


def _faiss() -> Iterator[Finding]:
    module = _imported("faiss", "faiss", "runs need it")
    if isinstance(module, Finding):
        yield module
        return
    gpus = module.get_num_gpus() if hasattr(module, "get_num_gpus") else 0
    means = f"searches on {pluralize(gpus, 'GPU')}" if gpus else "searches on the CPU; on GPUs torch searches"
    yield Finding("faiss", "ok", f"{module.__version__} ({faiss_distribution() or 'of unknown origin'})", means)


def _decoders() -> Iterator[Finding]:
    import numpy as np
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.full((8, 8, 3), 128, np.uint8)))
    right = pixels.shape == (8, 8, 3) and abs(int(pixels.mean()) - 128) < 4
    found = f"simplejpeg {_version('simplejpeg')}, Pillow {_version('pillow')}"
    yield Finding("JPEG", "ok" if right else "warning", found, "" if right else "it decodes grey to another colour")


def _formats() -> Iterator[Finding]:
    from PIL import Image, features

    there = [name for name in ("webp", "avif") if features.check(name)]
    absent = [name for name in ("webp", "avif") if name not in there]
    found = ", ".join(["JPEG, PNG, GIF, BMP, TIFF", *(name.upper() for name in there)])
    means = f"this Pillow was built without {' and '.join(absent)}: such images are left out" if absent else ""
    yield Finding("formats", "warning" if absent else "ok", found, means)
    module = _imported("HEIC", "pillow_heif")
    if isinstance(module, Finding):
        yield Finding(module.name, module.state, module.found, f"such photos are left out: {module.means}")
        return
    module.register_heif_opener()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(stream, "HEIF")
    size = Image.open(io.BytesIO(stream.getvalue())).size
    yield Finding("HEIC", "ok" if size == (64, 64) else "warning", f"pillow-heif {_version('pillow-heif')}")


def _parquet() -> Iterator[Finding]:
    module = _imported("parquet", "pyarrow")
    yield module if isinstance(module, Finding) else Finding("parquet", "ok", f"pyarrow {module.__version__}")


def _stores() -> Iterator[Finding]:
    for scheme, module in {"http(s)": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(f"{scheme}://", "missing", "not installed", f"for shards there: {install_line(module)}")
        else:
            yield Finding(f"{scheme}://", "ok", f"{module} {_version(module)}")


def _weights() -> Iterator[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    models = len(list(folder.glob("models--timm--*"))) if folder.is_dir() else 0
    offline = "; nothing is downloaded: HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    yield Finding("weights", "ok", f"{pluralize(models, 'model')} of timm in {folder}{offline}")


def _cores() -> Iterator[Finding]:
    usable, there = usable_cores(), os.cpu_count() or 1
    few = usable < 2
    found = f"{usable:g} usable" + (f" of {there}" if usable < there else "")
    means = "reading and computing share one core" if few else ""
    if parts := _parts_of_gpus():
        means = f"{parts} for each GPU's worker, of which as many threads read ahead, unless settings say otherwise"
    yield Finding("cores", "warning" if few else "ok", found, means)


def _parts_of_gpus() -> int:
    """CPUs of a worker where there are GPUs; 0 without."""
    try:
        from grappa_dist.config import Resources
        from grappa_dist.distributed.placement import WorkerParts
    except (ImportError, OSError):
        return 0
    parts = WorkerParts.here(Resources())
    return parts.cpus if parts.gpu else 0


def _memory() -> Iterator[Finding]:
    from grappa_dist.distributed.preflight import free_memory

    free = free_memory()
    little = free < LITTLE_MEMORY
    means = "little for a worker and the driver, of some 0.7 GiB each without data" if little else ""
    yield Finding("memory", "warning" if little else "ok", f"{format_bytes(free)} free", means)


def _shared_memory() -> Iterator[Finding]:
    from grappa_dist.distributed.local_ray import OBJECT_STORE_BYTES

    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("/dev/shm", "warning", "not there", "Ray keeps its objects in TMPDIR instead, which is slower")
        return
    usage = shutil.disk_usage(path)
    little = usage.free < OBJECT_STORE_BYTES
    means = (
        f"Ray wants {format_bytes(OBJECT_STORE_BYTES)} and takes TMPDIR instead, which is slower, and NCCL may fail; a "
        "container gets more by --shm-size=1g"
    )
    found = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free"
    yield Finding("/dev/shm", "warning" if little else "ok", found, means if little else "")


def _disk(out: Path) -> Iterator[Finding]:
    for name, folder in (("runs", out.absolute()), ("TMPDIR", Path(tempfile.gettempdir()))):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        found = f"{folder}: {format_bytes(free)} free"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Finding(name, "warning", f"{folder}: cannot be written", "", True)
        elif free < LITTLE_DISK:
            yield Finding(name, "warning", found, "`grappa-dist plan` says what a run writes")
        else:
            yield Finding(name, "ok", found)


def _open_files() -> Iterator[Finding]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= FEW_FILES:
        allowed = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
        yield Finding("open files", "ok", f"{allowed:,} allowed")
    else:
        means = f"Ray and many shards need more: ulimit -Hn {MOST_OPEN_FILES}, as the administrator"
        yield Finding("open files", "warning", f"{hard:,} allowed", means)
