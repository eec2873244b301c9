"""Renders our manifests with kustomize and validates them against schemas, as a strict API server does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.e2e.runs import ROOT

FOLDER = ROOT / "cluster" / "kubernetes"
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        **{k: {"type": "object", "additionalProperties": {"type": "string"}} for k in ("labels", "annotations")},
    },
}


def kustomize() -> list[str]:
    """The command that renders a folder, or nothing: both are offline."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else []


def render(folder: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "KUBECONFIG": os.devnull}  # of no use here, and none of our business
    ended = subprocess.run([*kustomize(), str(folder)], text=True, capture_output=True, env=environment, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def crd_folder() -> Path | None:
    """KubeRay's custom resource definitions: a folder named by the environment, or beside the repository."""
    shared = os.environ.get("GRAPPA_SHARED", str(ROOT.parent / "shared"))
    folder = Path(os.environ.get("GRAPPA_KUBERAY_CRDS", Path(shared) / "data" / "kuberay_crds"))
    return folder if list(folder.glob("*.yaml")) else None


def strict(schema: Any) -> Any:
    """JSON schema that refuses what the API server would drop in silence: fields that no schema names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: {n: strict(p) for n, p in v.items()} if k == "properties" else strict(v) for k, v in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    open_ended = "additionalProperties" in made or schema.get("x-kubernetes-preserve-unknown-fields")
    if made.get("type") == "object" and "properties" in made and not open_ended:
        made["additionalProperties"] = False
    if "required" in made:  # the server fills in defaults first
        made["required"] = [r for r in made["required"] if "default" not in schema.get("properties", {}).get(r, {})]
    return made


@cache
def _schemas(folder: Path) -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            kind = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            found[kind] = jsonschema.Draft7Validator(schema)
    return found


def faults(manifest: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a resource of KubeRay's, by its schema and by what the operator's code refuses beyond it."""
    validator = _schemas(folder)[manifest["apiVersion"], manifest["kind"]]
    found = [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(manifest)]
    return found or list(_refused(manifest))


def _refused(manifest: dict[str, Any]) -> Iterator[str]:
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield f"metadata.name: {name} is not a DNS label of at most 47 characters"
    if manifest["kind"] == "RayJob":
        if spec.get("submissionMode") not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
            yield f"submissionMode: {spec.get('submissionMode')}"
        if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
            yield "exactly one of rayClusterSpec and clusterSelector"
        for key in ("ttlSecondsAfterFinished", "suspend"):
            if spec.get(key) and not spec.get("shutdownAfterJobFinishes"):
                yield f"{key} needs shutdownAfterJobFinishes"
    for group in groups(manifest):
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31):
            yield f"{group['groupName']}: minReplicas is more than maxReplicas"
        for container in group["template"]["spec"]["containers"]:
            volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
            lacking = [m["name"] for m in container.get("volumeMounts", []) if m["name"] not in volumes]
            if lacking:
                yield f"{group['groupName']}: no volume for the mounts {lacking}"


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and workers of a RayJob or RayCluster."""
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [{"groupName": "head", **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]]


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods that result from it, as separate resources."""
    templates = {group["groupName"]: group["template"] for group in groups(manifest)}
    if "submitterPodTemplate" in manifest["spec"]:
        templates["submitter"] = manifest["spec"]["submitterPodTemplate"]
    for name, template in templates.items():
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
