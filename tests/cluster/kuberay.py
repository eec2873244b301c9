"""Does for a RayJob what KubeRay's operator and a kubelet do, on machines in namespaces: one machine is one pod.

Commands are those that KubeRay v1 generates. There is no API server, no image (the repository and its Python stand in
for /opt/grappa), no limit on CPU or memory and no separate user.
"""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.machines import Bench, Machine
from tests.cluster.manifests import groups
from tests.cluster.rays import environment
from tests.e2e.runs import ROOT

TOKEN = secrets.token_hex(32)  # of the Secret that the operator makes
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
HEALTHY = "import sys, urllib.request as u; sys.exit(b'success' not in u.urlopen(sys.argv[1], timeout=5).read())"
GENERATED = {"block": "true", "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def mount(machine: Machine, pod: Mapping[str, Any], claims: Mapping[str, Path]) -> None:
    """Makes the pod's volumes: claims by a folder of storage, memory by a tmpfs of its size, scratch by a tmpfs."""
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    script = ["set -e", "mountpoint -q /mnt || mount -t tmpfs mnt /mnt"]
    for wanted in pod["containers"][0].get("volumeMounts", []):
        volume, path = volumes[wanted["name"]], shlex.quote(wanted["mountPath"])
        if "persistentVolumeClaim" in volume:
            folder = claims[volume["persistentVolumeClaim"]["claimName"]]
            script.append(f"mkdir -p {path} && mount --bind {shlex.quote(str(folder))} {path}")
        elif volume["emptyDir"].get("medium") == "Memory":
            size = num_bytes(volume["emptyDir"]["sizeLimit"])
            script.append(f"mount -t tmpfs -o mode=1777,size={size} shm {path}")
        else:
            assert path == "/tmp", path  # a machine's /tmp is its own already
    machine.output("bash", "-c", "\n".join(script))


def variables(pod: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, str]:
    """A pod's environment: the operator gives the same token to all pods of a cluster, and to the submitter."""
    given = {entry["name"]: entry["value"] for entry in pod["containers"][0].get("env", [])}
    mode = job["spec"]["rayClusterSpec"]["authOptions"]["mode"]
    return environment(RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=TOKEN, RAY_DISABLE_USAGE_STATS="1", **given)


def start_command(group: Mapping[str, Any], head: str) -> str:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    flags = {**GENERATED, "num-cpus": str(limits["cpu"]), "memory": str(num_bytes(limits["memory"]))}
    if "nvidia.com/gpu" in limits:
        flags["num-gpus"] = str(limits["nvidia.com/gpu"])
    flags |= group["rayStartParams"]
    flags |= {} if group["groupName"] == "head" else {"address": f"{head}:6379"}
    options = " ".join(
        f"--{name}" if value == "true" else f"--{name}={shlex.quote(value)}" for name, value in flags.items()
    )
    wait = f"until ray health-check --address {head}:6379 >/dev/null 2>&1; do sleep 1; done; "
    return f"ulimit -n 65536; {'' if group['groupName'] == 'head' else wait}exec ray start " + (
        f"--head {options}" if group["groupName"] == "head" else options
    )


def submit_command(spec: Mapping[str, Any], url: str) -> str:
    """What the submitter pod runs: waits for the dashboard, submits once, follows the log, exits by the status."""
    submission = ["ray", "job", "submit", "--address", url, "--no-wait", "--submission-id", "job"]
    submission += ["--runtime-env-json", json.dumps(yaml.safe_load(spec["runtimeEnvYAML"]))]
    entrypoint = spec["entrypoint"].replace("/opt/grappa", str(ROOT))
    return "; ".join(
        [
            f"until python -c {shlex.quote(HEALTHY)} {url}/api/gcs_healthz >/dev/null 2>&1; do sleep 1; done",
            f"ray job status --address {url} job >/dev/null 2>&1 || {shlex.join(submission)} -- {entrypoint}",
            f"ray job logs --address {url} --follow job",
            f"ray job status --address {url} job 2>&1 | tee /dev/stderr | grep -qi succeeded",
        ]
    )


@contextmanager
def pods_of(job: Mapping[str, Any], bench: Bench, claims: Mapping[str, Path], logs: Path) -> Iterator[Machine]:
    """Head and worker pods of a RayJob, starting; the machine that is left for the submitter."""
    head, workers = groups(dict(job))
    pods = [head, *[workers] * workers["replicas"]]
    machines = [bench[number] for number in range(len(pods) + 1)]
    with ExitStack() as stack:
        for group, machine in zip(pods, machines, strict=False):
            stack.callback(machine.reboot)  # mounts and processes go with it
            spec = group["template"]["spec"]
            mount(machine, spec, claims)
            file = stack.enter_context(open(logs / f"{machine.name}.log", "w"))
            command = ["bash", "-c", start_command(group, machines[0].address)]
            process = machine.popen(command, env=variables(spec, job), stdout=file, stderr=subprocess.STDOUT)
            stack.callback(process.wait, timeout=60)
            stack.callback(machine.crash)
        yield machines[-1]


def run_job(job: Mapping[str, Any], bench: Bench, claims: Mapping[str, Path], logs: Path) -> tuple[int, str]:
    """The exit status of the submitter pod, by which the RayJob has succeeded or failed, and its output."""
    with pods_of(job, bench, claims, logs) as submitter:
        spec = job["spec"]["submitterPodTemplate"]["spec"]
        mount(submitter, spec, claims)
        command = submit_command(job["spec"], f"http://{bench[0].address}:8265")
        ended = submitter.run("bash", "-c", command, env=variables(spec, job), timeout_s=400)
        return ended.returncode, ended.stdout + ended.stderr
