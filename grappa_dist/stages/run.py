"""What every stage is given: the settings, the storage, the workers, and somebody to tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.dist.cluster import Cluster
from grappa_dist.dist.jobs import Runner
from grappa_dist.observe import EVENTS_FILE, Console, Events


@dataclass(frozen=True)
class Run:
    config: Config
    store: Store
    runner: Runner
    console: Console


@contextmanager
def running(config: Config, root: Path) -> Iterator[Run]:
    """A run that alone writes to its directory; workers start when they are first needed and end with it.

    Raises:
        ValueError: the directory cannot be written to, or another run writes to it.
        Terminated: SIGTERM or Ctrl-C came; what was running has saved its state.
    """
    store = Store(root)
    with store.lock():
        console = Console(Events(root / EVENTS_FILE))
        cluster = Cluster(config.resources, tell=console.say)
        runner = Runner(cluster, config.resources, console.jobs, console.event, on_interrupt=console.say)
        try:
            with runner.terminating():
                yield Run(config, store, runner, console)
        finally:
            cluster.close()
