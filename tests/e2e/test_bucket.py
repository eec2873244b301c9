"""The real program with its run directory on an S3 server: killed, its folder lost, finished by the same command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grappa_dist.bucket import folder_of
from grappa_dist.lease import LEASE_S
from tests.conftest import Bucket
from tests.e2e.runs import PATIENCE_S, ROOT
from tests.stages import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def program(config: Path, out: str, tmpdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", out]
    environment = {**os.environ, "TMPDIR": str(tmpdir), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_killed_run_whose_folder_is_lost_is_finished_by_the_same_command(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    settings = tiny.config(tiny.write_shards(tmp_path / "images"), resources={"workers": 1, "num_cpus": 1})
    config, out = tmp_path / "tiny.yaml", f"{bucket.url}/runs/mine"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (tmp_path / "tmp").mkdir()
    first, end = program(config, out, tmp_path / "tmp"), time.monotonic() + PATIENCE_S
    try:
        while not any(name.endswith("/checksums.json") for name in bucket.names()):
            assert first.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    finally:
        first.kill()
        print(first.communicate()[0])
    shutil.rmtree(folder_of(out, str(tmp_path / "tmp" / f"grappa-runs-{os.getuid()}")))
    second = program(config, out, tmp_path / "tmp")
    said = second.communicate(timeout=PATIENCE_S)[0]
    if time.monotonic() - killed < LEASE_S:
        assert second.returncode == 2
    if second.returncode == 2:
        assert said.splitlines()[-1].startswith(f"error: another run is writing to {out} (process {first.pid} on ")
        time.sleep(max(0.0, killed + LEASE_S + 2 - time.monotonic()))
        second = program(config, out, tmp_path / "tmp")
        said = second.communicate(timeout=PATIENCE_S)[0]
    assert second.returncode == 0, said
    assert "damaged" not in said
    assert f"bucket  {out}/report/report.html and {out}/model" in said
    names = {name.removeprefix("runs/mine/") for name in bucket.names()}
    assert {"report/report.html", "model/model.safetensors", "config.yaml", "run.log"} <= names
    assert not [name for name in names if ".partial" in name or name.startswith("packs/")]
    shown = subprocess.run(
        [sys.executable, "-m", "grappa_dist", "status", out],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert shown.returncode == 0, shown.stderr
    assert "state  done" in shown.stdout
