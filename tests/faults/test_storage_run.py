"""Whole runs on storage that errs: they end well, with the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.injection import StorageErrors, why_unavailable
from tests.faults.matrix import temporary
from tests.faults.small_run import SmallRun, write_config, write_data

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]


@pytest.fixture(scope="module")
def config() -> Iterator[Path]:
    with temporary() as folder:
        write_data(folder / "data")
        write_config(folder / "run.yaml", str(folder / "data"))
        yield folder / "run.yaml"


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> dict[str, str]:
    run = SmallRun(config.parent / "whole", config)
    driver = run.start()
    assert driver.process.wait(timeout=600) == 0, driver.output
    return run.artefacts()


@pytest.mark.parametrize(
    ("rate", "error"), [(0.002, errno.EIO), (0.02, errno.EIO), (0.02, errno.ESTALE), (0.02, errno.ETIMEDOUT)]
)
def test_a_run_on_storage_that_errs_now_and_then_ends_well_with_the_same_bytes(
    config: Path, undisturbed: dict[str, str], rate: float, error: int
) -> None:
    name = f"{errno.errorcode[error]}-{rate}"
    run = SmallRun(config.parent / name, config)
    with StorageErrors(config.parent / f"{name}.control", [run.root, config.parent / "data"], seed=24) as storage:
        run.environment = storage.environment
        storage.err(rate, error)
        try:
            driver = run.start()
            status = driver.process.wait(timeout=600)
        finally:
            run.end_all()
        assert status == 0, driver.output
        assert storage.counts.failed
    assert run.artefacts() == undisturbed


@pytest.mark.parametrize("capacity", [0, 20_000, 200_000, 800_000])
def test_a_full_disk_ends_a_run_with_a_line_and_the_next_start_with_space_ends_well(
    config: Path, undisturbed: dict[str, str], capacity: int
) -> None:
    run = SmallRun(config.parent / f"full-{capacity}", config)
    run.root.mkdir()
    with StorageErrors(config.parent / f"full-{capacity}.control", [run.root]) as storage:
        run.environment = storage.environment
        storage.full_after(capacity)
        try:
            driver = run.start()
            assert driver.process.wait(timeout=600) in (1, 2), driver.output
            assert "No space left on device" in driver.error()
            assert str(run.root) in driver.error()
            assert all(undisturbed[name] == found for name, found in run.artefacts().items())
            storage.full_after(None)
            assert run.start().process.wait(timeout=600) == 0
        finally:
            run.end_all()
    assert run.artefacts() == undisturbed
