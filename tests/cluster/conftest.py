from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import machines, slurm
from tests.cluster.machines import Bench
from tests.cluster.slurm import Slurm
from tests.e2e.runs import ROOT

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figure() -> Callable[..., None]:
    """Keeps a measured number, of seconds unless `unit` is another, for the end of the session's output."""
    return lambda what, value, unit="s": FIGURES.append(f"{what}: {value:.3g} {unit}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(FIGURES))


@pytest.fixture(scope="session")
def storage() -> Iterator[Path]:
    """A folder that all machines see under one path."""
    with tempfile.TemporaryDirectory(prefix="storage-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def bench(storage: Path) -> Iterator[Bench]:
    """n0 and three more machines."""
    why_not = machines.missing()
    if why_not:
        pytest.skip(f"no machines in namespaces: {why_not}")
    # resolved once: an environment's python links to the one it was made from
    shared = dict.fromkeys([ROOT, Path(sys.prefix), Path(sys.base_prefix), storage])
    with Bench(storage / "machines", 4, list(shared)) as made:
        yield made


@pytest.fixture(scope="session")
def slurm_of_the_bench(bench: Bench, storage: Path) -> Slurm:
    why_not = slurm.missing()
    if why_not:
        pytest.skip(f"no Slurm: {why_not}")
    made = Slurm(bench, storage / "slurm")
    made.start()
    return made


@pytest.fixture
def cluster(slurm_of_the_bench: Slurm) -> Iterator[Slurm]:
    """A Slurm in which nothing runs, before and after."""
    yield slurm_of_the_bench
    slurm_of_the_bench.command("scancel", "--user=root")
    slurm_of_the_bench.wait_for(lambda: not slurm_of_the_bench.command("squeue", "-h"), "an empty queue", 60)


@pytest.fixture
def folder(storage: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of this test on storage."""
    return Path(tempfile.mkdtemp(prefix=f"{request.node.name[:40]}-", dir=storage))
