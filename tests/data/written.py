"""Tars and shards for tests to read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from grappa_dist.data.writer import ShardWriter


def write_tar(
    path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(folder: Path, rows: int, **limits: int | None) -> ShardWriter:
    with ShardWriter(folder, **limits) as writer:  # type: ignore[arg-type]
        for row in range(rows):
            writer.write(bytes([row]) * (row + 1), "jpg", f"class {row % 3}" if row % 2 else None)
    return writer


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
