"""A real Slurm on the bench's machines: n0 is the login node and runs slurmctld, every other one runs slurmd."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.machines import Bench, Machine

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS, MEMORY_MB, GPUS = 4, 6000, 2
CONF = """
ClusterName=bench
SlurmctldHost=n0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdTimeout={slurmd_timeout_s}
KillWait=15
MessageTimeout=10
CompleteWait=0
GresTypes=gpu
NodeName=n[1-{count}] CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=bench Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""
MUNGE = """set -e
mkdir -p /tmp/munge; chmod 711 /tmp/munge; install -m 400 "$1/munge.key" /tmp/munge/key
munged --key-file=/tmp/munge/key --socket=/tmp/munge/socket --pid-file=/tmp/munge/pid --log-file=/tmp/munge/log \\
  --seed-file=/tmp/munge/seed --force
"""
TESTED_PATIENCE_S = 240.0


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    lacking = [daemon for daemon in DAEMONS if shutil.which(daemon) is None]
    return f"needs {', '.join(lacking)}: run tests/cluster/install_slurm.sh" if lacking else ""


@dataclass
class Slurm:
    """Commands run on the login node, n0."""

    bench: Bench
    folder: Path
    slurmd_timeout_s: int = 300  # Slurm's default: silence of a node for so long makes it DOWN

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        count = self.bench.count - 1
        conf = CONF.format(
            folder=self.folder,
            count=count,
            cpus=CPUS,
            memory=MEMORY_MB,
            gpus=GPUS,
            slurmd_timeout_s=self.slurmd_timeout_s,
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        fake = "".join(f"Name=gpu File={self.folder}/gpu{i} Flags=nvidia_gpu_env\n" for i in range(GPUS))
        (self.folder / "gres.conf").write_text(fake)
        for number in range(GPUS):  # devices that cannot be opened; plain files are scheduled as well, without a number
            try:
                os.mknod(self.folder / f"gpu{number}", 0o020600, os.makedev(195, 250 + number))
            except PermissionError:
                (self.folder / f"gpu{number}").touch()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        for machine in self.bench.machines:
            self.start_on(machine)
        self.wait_for(lambda: self.states().count("idle") == count, "all nodes idle", patience_s=30)

    def start_on(self, machine: Machine) -> None:
        machine.output("bash", "-c", MUNGE, "munge", str(self.folder))
        daemon = ["slurmctld", "-c"] if machine.number == 0 else ["slurmd", "-N", machine.name]
        machine.output(*daemon, env=self.environment)

    def bring_back(self, machine: Machine) -> None:
        """Switches a dead machine on again."""
        machine.reboot()
        self.start_on(machine)
        self.bench[0].run("scontrol", "update", f"NodeName={machine.name}", "State=RESUME", env=self.environment)
        self.wait_for(lambda: not {"down", "down*"} & set(self.states()), "no dead nodes", patience_s=60)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RAY_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *command: str) -> str:
        return self.bench[0].output(*command, env=self.environment)

    def states(self) -> list[str]:
        """Of the nodes: idle, mixed, allocated, down, ..."""
        ended = self.bench[0].run("sinfo", "-hN", "-o", "%T", env=self.environment)
        return ended.stdout.split()

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "")

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job: JobState, ExitCode, Restarts, ..."""
        ended = self.bench[0].run("scontrol", "show", "job", job, "--oneliner", env=self.environment)
        return dict(re.findall(r"(\S+?)=(\S*)", ended.stdout))

    def wait_for_state(self, job: str, *states: str, patience_s: float = TESTED_PATIENCE_S) -> str:
        self.wait_for(lambda: self.state(job) in states, f"job {job} is {' or '.join(states)}", patience_s)
        return self.state(job)

    def wait_for(self, happened: Callable[[], object], what: str, patience_s: float = TESTED_PATIENCE_S) -> float:
        """Seconds that it took; TimeoutError names `what`."""
        began = time.monotonic()
        while not happened():
            if time.monotonic() - began > patience_s:
                raise TimeoutError(f"not seen within {patience_s:g} s: {what}")
            time.sleep(0.2)
        return time.monotonic() - began

    def skip_the_pause(self, job: str, *changes: str) -> float:
        """Slurm lets a requeued job wait for two minutes, ten seconds will do; how many it took until it waits."""
        took = self.wait_for(lambda: self.state(job) == "PENDING", f"job {job} waits to start again")
        # not at once: a start within a second, on the same node, is caught by the end of the first life
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now+10", *changes)
        return took

    def left_behind(self, numbers: Sequence[int]) -> dict[str, list[str]]:
        """Processes and temporary folders that a job left on nodes."""
        left: dict[str, list[str]] = {}
        for number in numbers:
            machine = self.bench[number]
            ours = [args for args in machine.processes().values() if not re.match(r"(munged|slurmd|slurmctld)\b", args)]
            ours += [str(path) for path in machine.tmp.glob("grappa*")] + [str(p) for p in machine.tmp.glob("ray*")]
            if ours:
                left[machine.name] = ours
        return left
