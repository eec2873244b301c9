"""What every stage is given: the settings, the storage, the workers, and somebody to tell."""

from __future__ import annotations

from dataclasses import dataclass

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.dist.jobs import Runner
from grappa_dist.observe import Console


@dataclass(frozen=True)
class Run:
    config: Config
    store: Store
    runner: Runner
    console: Console
