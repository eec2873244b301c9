"""Packages that only some commands need: which extra of this package brings each, and what is said without it."""

from __future__ import annotations

import importlib.util

TRAINING = "cpu"  # or gpu
RUNS = ("ray", "deepspeed", "faiss")  # what every run needs, on all nodes
EXTRAS = {  # module -> extra, as in pyproject.toml
    "ray": TRAINING,
    "deepspeed": TRAINING,
    "faiss": TRAINING,
    "webdataset": TRAINING,
    "pyarrow": "parquet",
    "pillow_heif": "heif",
    "aiohttp": "http",
    "s3fs": "s3",
    "gcsfs": "gs",
    "scipy": "benchmarks",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "starlette": "serve",
    "uvicorn": "serve",
    "umap": "map",
    "sklearn": "sklearn",
    "mteb": "mteb",
}


class MissingPackage(ValueError, ImportError):
    """A package is not installed that what was asked for needs; the message is one line with the install command."""


def install_line(module: str) -> str:
    """The command that installs a module's package, such as "pip install 'grappa-dist[parquet]'"."""
    extra = EXTRAS[module]
    others = ", or 'grappa-dist[gpu]' where there are GPUs" if extra == TRAINING else ""
    return f"pip install 'grappa-dist[{extra}]'{others}"


def require(*modules: str, what: str = "") -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
        what: that which needs them, for the message: a setting, a URL, files.

    Raises:
        MissingPackage: naming the first that is not.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing(module, what)


def missing(module: str, what: str = "") -> MissingPackage:
    """The error for a package that is not installed."""
    needs = f"{what}: needs {module}, which" if what else module
    return MissingPackage(f"{needs} is not installed: {install_line(module)}")


def explained(error: ImportError) -> ImportError:
    """The error of an import: with the install command, if it is one of the optional packages that was not found."""
    module = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and module in EXTRAS and importlib.util.find_spec(module) is None:
        return missing(module)
    return error
