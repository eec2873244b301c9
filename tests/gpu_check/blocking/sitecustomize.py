"""Python imports this when it starts: it hides every package but those in GPU_CHECK_PACKAGES, as on a machine without.

Of what is hidden, `importlib.util.find_spec` finds nothing either.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Hiding:
    """A finder that finds what another one does, of packages that are not hidden."""

    def __init__(self, finder: Any, known: frozenset[str]) -> None:
        self._finder, self._known = finder, known

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        return self._finder.find_spec(name, path, target) if self._shown(top) else None

    def _shown(self, top: str) -> bool:
        return top in self._known or top.startswith("_sysconfigdata")  # of the standard library, named by the platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


if "GPU_CHECK_PACKAGES" in os.environ:
    _known = frozenset(json.loads(os.environ["GPU_CHECK_PACKAGES"])) | sys.stdlib_module_names
    _known |= {"grappa_dist", "launch", "sitecustomize", "__main__", "__mp_main__"}
    sys.meta_path[:] = [
        finder if getattr(finder, "__name__", "") in ("BuiltinImporter", "FrozenImporter") else Hiding(finder, _known)
        for finder in sys.meta_path
    ]
