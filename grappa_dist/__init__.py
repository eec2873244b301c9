"""grappa_dist: one retrieval model for many tasks, adapted from a frozen ViT with unlabelled images alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

if TYPE_CHECKING:
    from grappa_dist.export import load_model


def __getattr__(name: str) -> Any:
    if name == "load_model":  # torch loads when a model does, not before
        from grappa_dist.export import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
