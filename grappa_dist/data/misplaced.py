"""What to do about a folder that was named for shards and has none."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections import deque
from collections.abc import Iterator
from itertools import islice

from grappa_dist.data.making.encoding import TAKEN

_LOOKED_AT = 10_000  # entries below a folder, at most
_SHOWN = 3
_IN_THE_MAKING = re.compile(r".*/\.[^/]+\.partial(?=/|$)")


def instead_of(entry: str) -> str:
    """The end of an error about a local path without a tar: where its shards are, or what makes some; else ""."""
    if not os.path.isdir(entry):
        return ""
    files = _files(entry)
    below = sorted({os.path.dirname(path) for path in files if path.endswith(".tar")})
    if making := [match[0] for path in below if (match := _IN_THE_MAKING.match(path))]:
        return f"; {making[0]} is in the making: run the command that began it again, and it is finished"
    if below:
        more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        return f"; there are tars one level or more below: name {' or '.join(map(shlex.quote, below[:_SHOWN]))}{more}"
    image = next((path for path in files if path.lower().endswith(tuple(f".{s}" for s in TAKEN))), None)
    if image is None:
        return ""
    folder = os.path.normpath(entry)
    folder = f"./{folder}" if folder.startswith("-") else folder
    out = f"{folder if os.path.basename(folder) not in ('.', '..') else os.path.abspath(folder)}-shards"
    command = f"python launch/make_shards.py --images {shlex.quote(folder)} --split none --out {shlex.quote(out)}"
    return (
        f". It holds images, such as {image!r}, and no shards of them: make these by `{command}`, "
        f"then name {shlex.quote(os.path.join(out, 'train'))}"
    )


def _files(folder: str) -> list[str]:
    """The first files at and below a folder, nearer ones first; links to folders are left out."""
    paths = (entry.path for entry in islice(_entries(folder), _LOOKED_AT) if _is_file(entry))
    return sorted(paths, key=lambda path: (path.count("/"), path))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    folders = deque([folder])
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
