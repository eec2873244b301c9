"""cluster/slurm/job.py without Slurm: how long a program that is asked to save may take."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import cast

import pytest

from cluster.slurm import job

SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)
"""


class OneNodeLost:
    """A cluster of two nodes whose second is gone, and with it the job step of all nodes but the first."""

    nodes, num_alive, is_running = ("n1", "n2"), 1, True

    def lost(self, of: int) -> str:
        return "step workers has ended"


@pytest.mark.parametrize(("node_loss", "status"), [("stay", 143), ("requeue", 137)])
def test_with_lost_nodes_and_node_loss_requeue_there_is_less_time_to_save(
    monkeypatch: pytest.MonkeyPatch, node_loss: str, status: int
) -> None:
    monkeypatch.setattr(job, "LOST_S", 0.3)
    given = argparse.Namespace(node_loss=node_loss, save_s=30.0)
    follower = job.Job(given, cast("job.Cluster", OneNodeLost()))
    process = subprocess.Popen([sys.executable, "-c", SAVES], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    follower.ask("the time limit is near", (job.SAVED,))
    assert follower._follow(process) == status
    process.stdout.close()
