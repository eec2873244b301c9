"""The rules that a Dockerfile of ours keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order; comments are gone and continued lines joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", kept).splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line.strip()]


def complaints(text: str) -> Iterator[str]:
    found = instructions(text)
    names = [name for name, _ in found]
    for name, rest in found:
        if name == "FROM" and not re.search(r":\d+\.\d+\.\d+", rest):
            yield f"FROM {rest}: no exact version"
        if name == "ADD":
            yield "ADD: COPY says what it does"
        if name == "COPY" and rest.split()[0] == ".":
            yield "COPY .: name what is copied"
        if name in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            yield f"{name}: a shell would swallow signals"
        if name == "WORKDIR" and not rest.startswith("/"):
            yield f"WORKDIR {rest}: not absolute"
        if name == "RUN":
            yield from _of_run(rest)
    if "|" in text and "pipefail" not in text:
        yield "a pipe hides the failure of what is before it: SHELL with pipefail"
    users = [rest for name, rest in found if name == "USER"]
    if not users or users[-1] in ("0", "root"):
        yield "runs as root"
    if "USER" in names and "RUN" in names[names.index("USER") :]:
        yield "RUN after USER"


def _of_run(command: str) -> Iterator[str]:
    if "apt-get install" in command:
        if "apt-get update" not in command:
            yield "apt-get install in another layer than update: stale lists"
        if "--no-install-recommends" not in command:
            yield "apt-get install without --no-install-recommends"
        if "rm -rf /var/lib/apt/lists" not in command:
            yield "apt's lists stay in the layer"
        packages = re.split(r"&&|;", command.split("apt-get install")[1])[0].split()
        if loose := [p for p in packages if not p.startswith("-") and "=" not in p]:
            yield f"apt packages of any version: {loose}"
    for install in re.findall(r"pip install[^;&]*", command):
        if "--no-cache-dir" not in install:
            yield "pip's cache stays in the layer"
        if "-c constraints.txt" not in install and "--no-deps" not in install:
            yield f"versions of any kind: {install.strip()}"
    if "sudo" in command.split():
        yield "sudo"
