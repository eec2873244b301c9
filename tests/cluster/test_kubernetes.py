"""The manifests: what they come to, held to KubeRay's and Kubernetes' schemas. No API server is asked."""

from __future__ import annotations

import ast
import copy
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from grappa_dist.distributed.runner import STOP_GRACE_S
from tests.cluster import manifests
from tests.cluster.dockerfile import complaints, instructions
from tests.cluster.kuberay import num_bytes
from tests.cluster.manifests import FOLDER, groups, pods
from tests.e2e.runs import ROOT

OVERLAYS = {"job": "RayJob", "queued-job": "RayJob", "interactive": "RayCluster"}
VERSIONS = ("1.29", "1.33", "1.36")  # of Kubernetes


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    if not manifests.kustomize():
        pytest.skip("neither kustomize nor kubectl is installed: the manifests are not rendered")
    return {
        path.parent.name: manifests.render(path.parent)
        for path in FOLDER.glob("*/kustomization.yaml")
        if path.parent.name not in ("settings", "pods")
    }


def only(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (document,) = documents
    return document


def settings() -> dict[str, str]:
    lines = (FOLDER / "settings" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_each_folder_gives_its_kind_alone(rendered: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {folder: [document["kind"] for document in documents] for folder, documents in rendered.items()}
    queue = ["ClusterQueue", "LocalQueue", "ResourceFlavor"]
    expected = {**{folder: [kind] for folder, kind in OVERLAYS.items()}, "storage": ["PersistentVolumeClaim"]}
    assert {folder: sorted(found) for folder, found in kinds.items()} == {**expected, "queue": queue}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kuberay_would_accept_them(rendered: dict[str, list[dict[str, Any]]], folder: str) -> None:
    definitions = manifests.crd_folder()
    if definitions is None:
        pytest.skip("no custom resource definitions of KubeRay: name their folder in GRAPPA_KUBERAY_CRDS")
    manifest = only(rendered[folder])
    assert manifests.faults(manifest, definitions) == []
    broken = copy.deepcopy(manifest)  # and the schemas are as strict as they should be
    groups(broken)[1]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert any("volumeMount" in fault for fault in manifests.faults(broken, definitions))
    broken = copy.deepcopy(manifest)
    groups(broken)[1]["template"]["spec"]["volumes"].pop(0)
    assert manifests.faults(broken, definitions) == ["workers: no volume for the mounts ['shared']"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_would_accept_pods_and_claim(rendered: dict[str, list[dict[str, Any]]], version: str) -> None:
    documents = [pod for folder in OVERLAYS for pod in pods(only(rendered[folder]))]
    for document in [*documents, only(rendered["storage"])]:
        kubernetes_validate.validate(document, version, strict=True)
    broken = {**documents[0], "spec": {**documents[0]["spec"], "volume": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="volume"):
        kubernetes_validate.validate(broken, version, strict=True)


def test_no_name_of_a_setting_is_left_over(rendered: dict[str, list[dict[str, Any]]]) -> None:
    names = re.compile(rf"\b({'|'.join(map(str.upper, settings()))})\b")
    for folder, documents in rendered.items():
        for document in documents:
            text = yaml.safe_dump(document).replace("/mnt", "")
            assert names.findall(text) == [], folder


def test_every_setting_arrives(tmp_path: Path) -> None:
    if not manifests.kustomize():
        pytest.skip("neither kustomize nor kubectl is installed: the manifests are not rendered")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes" / "settings" / "settings.env"
    other = {name: f"other-{name.replace('_', '-')}" for name in settings()} | {
        "workers": "7",
        "gpus": "3",
        "cpus": "11",
        "memory": "13Gi",
        "shm": "17Gi",
        "scratch": "19Gi",
        "object_store": "290000000",
        "storage": "23Gi",
    }
    file.write_text("\n".join(f"{name}={value}" for name, value in other.items()))
    folders = ("queued-job", "interactive", "storage", "queue")
    text = "".join(yaml.safe_dump_all(manifests.render(tmp_path / "kubernetes" / folder)) for folder in folders)
    assert [name for name, value in other.items() if not re.search(rf"\b{value}\b", text)] == []
    before = [value for value in settings().values() if len(value) > 4 and not value.isalpha()]  # words occur elsewhere
    assert [value for value in before if value in text] == []


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_have_what_training_needs(rendered: dict[str, list[dict[str, Any]]], folder: str) -> None:
    head, workers = groups(only(rendered[folder]))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == int(settings()["workers"])
    for group in (head, workers):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group is workers)
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/mnt/grappa"]["persistentVolumeClaim"]["claimName"] == settings()["claim"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["terminationGracePeriodSeconds"] > STOP_GRACE_S
        store = int(group["rayStartParams"]["object-store-memory"])
        assert 2 * store <= num_bytes(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_collectives_take_exactly_one_interface(rendered: dict[str, list[dict[str, Any]]], folder: str) -> None:
    """Gloo takes only whole names; to NCCL a name without = is a prefix."""
    (container,) = groups(only(rendered[folder]))[1]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    name = settings()["interface"]
    assert (given["GLOO_SOCKET_IFNAME"], given["NCCL_SOCKET_IFNAME"]) == (name, f"={name}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a separate process namespace")
def test_before_a_pod_ends_the_program_is_asked_to_end_and_ranks_are_awaited(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    head, workers = (
        group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        for group in groups(only(rendered["job"]))
    )
    script = f"""
    (exec -a 'python /opt/grappa/launch/full_pipeline.py --out x' sleep 60) & program=$!
    (exec -a '/bin/sh -c python /opt/grappa/launch/full_pipeline.py --out x' sleep 60) & shell=$!
    (exec -a 'ray::Worker.run_rank' sleep 1.5) & rank=$!
    (exec -a 'ray::IDLE' sleep 60) & idle=$!
    sleep 0.3
    kill -0 $rank && bash -c {shlex.quote(workers)} && kill -0 $rank || echo rank ended
    bash -c {shlex.quote(head)}
    kill -0 $idle && kill -0 $shell && echo others live
    wait $program; echo program $?
    """
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=30)
    if "unshare" in ended.stderr:
        pytest.skip(f"no namespaces here: {ended.stderr.strip()}")
    assert ended.stdout.splitlines() == ["rank ended", "others live", "program 143"]


def test_lost_nodes_are_noticed_as_fast_as_where_we_start_ray_ourselves(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    program = ast.parse((ROOT / "cluster" / "ray_node.py").read_text())
    ours = next(
        ast.literal_eval(node.value)
        for node in program.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENVIRONMENT"
    )
    head, workers = groups(only(rendered["job"]))
    given: dict[str, str] = {}
    for group in (head, workers):
        given |= {entry["name"]: entry["value"] for entry in group["template"]["spec"]["containers"][0]["env"]}
    expected = {name: value for name, value in ours.items() if "health_check" in name or "reconnect" in name}
    assert len(expected) == 4
    assert {name: given.get(name) for name in expected} == expected


def test_a_job_cleans_up_and_only_a_queued_one_waits(rendered: dict[str, list[dict[str, Any]]]) -> None:
    job, queued = only(rendered["job"]), only(rendered["queued-job"])
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["ttlSecondsAfterFinished"] == 0  # it would keep the pods, and their GPUs
    assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert "suspend" not in job["spec"]
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": settings()["queue"]}
    del queued["metadata"]["labels"]
    assert queued == {**job, "spec": {**job["spec"], "suspend": True}}
    names = {d["metadata"]["name"] for d in rendered["queue"] if d["kind"] == "LocalQueue"}
    assert names == {settings()["queue"]}
    stop = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert stop["env_vars"] == yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())["env_vars"]
    assert float(stop["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > STOP_GRACE_S


def test_every_ray_asks_for_a_token_that_kuberay_makes(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for folder in OVERLAYS:
        spec = only(rendered[folder])["spec"]
        assert spec.get("rayClusterSpec", spec)["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH" not in (FOLDER / "Dockerfile").read_text()  # nothing that would override it


def test_one_version_of_ray_everywhere() -> None:
    version = settings()["ray_version"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text()
    assert settings()["image"].endswith(f"-ray{version}")
    assert settings()["image"] in (FOLDER / "Dockerfile").read_text()


def test_the_dockerfile_keeps_the_rules() -> None:
    assert list(complaints((FOLDER / "Dockerfile").read_text())) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("python:3.11.13-slim", "python:slim", "no exact version"),
        (" --no-install-recommends", "", "without --no-install-recommends"),
        ("&& rm -rf /var/lib/apt/lists/*", "", "lists stay"),
        ("wget=1.21.*", "wget", r"any version: \['wget'\]"),
        ("--no-cache-dir --no-deps", "--no-deps", "cache stays"),
        ("-c constraints.txt ", "", "versions of any kind"),
        ("USER 1000", "USER root", "runs as root"),
        ("COPY launch launch", "COPY . .", "name what is copied"),
        ("COPY configs", "ADD configs", "ADD"),
        ('CMD ["python", ', "CMD python ", "swallow signals"),
        ("WORKDIR /opt", "WORKDIR opt", "not absolute"),
    ],
)
def test_a_dockerfile_that_breaks_a_rule_gets_a_complaint_that_names_it(before: str, after: str, message: str) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert before in text
    assert any(re.search(message, complaint) for complaint in complaints(text.replace(before, after)))


def test_the_image_has_what_triton_builds_its_launchers_with_and_tries_it() -> None:
    commands = [rest for name, rest in instructions((FOLDER / "Dockerfile").read_text()) if name == "RUN"]
    (packages,) = [rest.split("apt-get install")[1].split("&&")[0] for rest in commands if "apt-get install" in rest]
    assert {"gcc", "libc6-dev"} <= {package.split("=")[0] for package in packages.split()}
    assert any("#include <Python.h>" in rest and "| gcc -fsyntax-only" in rest for rest in commands)
    assert not any("purge" in rest or "autoremove" in rest for rest in commands)


def test_all_that_the_dockerfile_copies_is_there_and_sent() -> None:
    sent = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source.rstrip("/")
        for name, rest in instructions((FOLDER / "Dockerfile").read_text())
        if name == "COPY"
        for source in rest.split()[:-1]
    }
    assert copied == sent
    assert [path for path in copied if not (ROOT / path).exists()] == []
