"""The files of artefacts, held against the manifest before they are used; damaged folders, set aside.

The manifest has size and checksum of every file. All that reads a file of an artefact calls `verified` first, mostly
through `load_json`, `load_array` or `artifacts.RowArrays`: it reads all bytes the first time that a process uses the
file. A file that is not what was written is a `DamagedArtifact`, upon which a run sets the folder aside and makes it
anew. Manifests that were written before there were checksums have sizes alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from grappa_dist.bucket import bucket_of, fetched_anew, here, move, used
from grappa_dist.files import Sum, map_array, parse_json, read_bytes, read_json, recorded, rename_to_free

MANIFEST = "manifest.json"
_UNFINISHED = ".partial"
MOST_MAPS = 2**14  # of rows, kept by a process, which may have 2^16: random rows of a shard without one take long
_DEPTH = 4  # folders of an artefact inside each other, at most
_HOME = re.compile(r"-[0-9a-f]{10}(\.partial)?$")  # the end of the name of an artefact's folder


class DamagedArtifact(ValueError):
    """A file of an artefact is missing, or is not what was written.

    Args:
        path: of the file.
        folder: the artefact's, finished or not.
        why: what follows the path in a sentence.
    """

    def __init__(self, path: str, folder: str, why: str) -> None:
        super().__init__(path, folder, why)  # so that it can be pickled
        self.path, self.folder, self.why = path, folder, why

    def __str__(self) -> str:
        return f"{self.path} {self.why}; the same run again sets {self.folder} aside and makes it anew"


def digest_of(content: Mapping[str, Any]) -> str:
    """A checksum of what a manifest says, given as it is read from JSON again."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(text: bytes, where: Path | str, folder: str | None = None) -> dict[str, Sum]:
    """The files that a manifest lists; without checksums where it was written before there were any.

    Args:
        folder: the name of the folder whose manifest it should be: folders may have been exchanged as a whole.

    Raises:
        ValueError: it is no manifest, or is damaged; the message names `where` it is from.
    """
    content = parse_json(text, where)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{where}: lists no files")
    if (digest := content.pop("xxh3", None)) is not None and digest != digest_of(content):
        raise ValueError(f"{where}: is not what was written: its checksum is {digest_of(content)}, it says {digest!r}")
    found = dict[str, Sum]()
    for name, listed in files.items():
        listed = {"bytes": listed, "xxh3": None} if isinstance(listed, int) else listed
        if not isinstance(listed, dict) or listed.keys() != {"bytes", "xxh3"} or not isinstance(listed["bytes"], int):
            raise ValueError(f"{where}: lists {name!r} with {listed!r:.100}, expected bytes and xxh3")
        found[name] = Sum(**listed)
    of = f"{str(content.get('kind')).rpartition('/')[2]}-{content.get('fingerprint')}"
    if folder not in (None, of):
        raise ValueError(f"{where}: is the manifest of {of}")
    return found


@lru_cache(maxsize=2**18)  # a hundred thousand shards of one model and some; 0.9 kB each
def manifest_in(folder: str) -> Mapping[str, Sum]:
    path = Path(folder) / MANIFEST
    try:
        try:
            return read_manifest(read_bytes(here(path)), path, path.parent.name)
        except ValueError:
            if not fetched_anew(path):
                raise
            return read_manifest(read_bytes(path), path, path.parent.name)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise
        raise DamagedArtifact(str(path), folder, "is missing") from None
    except ValueError as error:
        raise DamagedArtifact(str(path), folder, str(error).removeprefix(f"{path}: ")) from None


_verified: dict[str, tuple[int, int, int]] = {}  # path of a file -> what it was when its content was looked at


def verified(path: Path) -> Path:
    """The path of an artefact's file, once its bytes are found to be those that were written.

    All of it is read the first time that this process asks. A file of an unfinished artefact is compared with what its
    writer recorded, if anything. Files of no artefact are not looked at.

    Raises:
        DamagedArtifact: it has other bytes, is missing, or is not in the manifest.
    """
    home = _home_of(path)
    if home is None:
        return path
    expected, state = _expected(here(path), home), _state_of(path)
    used(path)
    if state is not None and _verified.get(str(path)) == state:
        return path
    if expected is None:
        if state is not None and not home.name.endswith(_UNFINISHED):
            raise DamagedArtifact(str(path), str(home), f"is not listed in {MANIFEST}")
        return path
    why = compare(path, expected)
    if why and not home.name.endswith(_UNFINISHED) and fetched_anew(path):
        why = compare(path, expected)
    if why:
        raise DamagedArtifact(str(path), str(home), why)
    _verified[str(path)] = state or (0, 0, 0)
    return path


def _home_of(path: Path) -> Path | None:
    """The folder of the artefact, finished or not, that a file belongs to."""
    return next((folder for folder in path.parents[:_DEPTH] if _HOME.search(folder.name)), None)


def _expected(path: Path, home: Path) -> Sum | None:
    """What a file of an artefact should be; None where that is not known."""
    if home.name.endswith(_UNFINISHED):
        return recorded(path)
    return manifest_in(str(home)).get(path.relative_to(home).as_posix())


def _state_of(path: Path | str) -> tuple[int, int, int] | None:
    """What changes with a file's bytes; None: there is no such file."""
    with suppress(FileNotFoundError):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino
    return None


def compare(path: Path, expected: Sum) -> str:
    """What is wrong with a file, after its path in a sentence; "" where nothing is."""
    why = compare_size(path, expected)
    if why or expected.xxh3 is None:
        return why
    for _ in range(2):  # what was read wrong once may be whole
        found = Sum.of(path)
        if found == expected:
            return ""
    return f"does not hold what was written: its xxh3 is {found.xxh3}, its manifest says {expected.xxh3}"


def compare_size(path: Path | str, expected: Sum) -> str:
    state = _state_of(path)
    if state is None:
        return "is missing"
    return "" if state[0] == expected.bytes else f"has {state[0]} bytes, its manifest says {expected.bytes}"


def forget() -> None:
    """Forgets which files this process has looked at, and closes those that it has mapped."""
    _verified.clear()
    manifest_in.cache_clear()
    map_rows.cache_clear()


def forget_maps(folder: Path) -> None:
    """Drops the maps that are kept for further reading, and what is known of the files below a folder.

    A disk keeps the bytes of removed files for their maps.
    """
    map_rows.cache_clear()
    for path in [path for path in list(_verified) if path.startswith(f"{folder}/")]:
        del _verified[path]


def damaged(path: Path, why: str) -> ValueError:
    """The error for a file whose content cannot be right: DamagedArtifact, unless a checksum shows that it was written
    like this.

    Args:
        why: what follows the path in a sentence.
    """
    home = _home_of(path)
    if home is None:
        return ValueError(f"{path} {why}")
    expected = _expected(path, home)
    if expected is not None and expected.xxh3 is not None and not compare(path, expected):
        return ValueError(f"{path} {why}, and this is what was written")
    return DamagedArtifact(str(path), str(home), why)


def load_json(path: Path) -> Any:
    """The value of a JSON file of an artefact.

    Raises:
        DamagedArtifact: it is not what was written.
    """
    try:
        return read_json(verified(path))
    except DamagedArtifact:
        raise
    except ValueError as error:
        raise damaged(path, f"is {str(error).removeprefix(f'{path}: ')}") from None


def load_array(path: Path) -> NDArray[Any]:
    """An array of an artefact, memory-mapped, read-only.

    Raises:
        DamagedArtifact: it is not what was written.
    """
    return _mapped(path, "r")


def _mapped(path: Path, mode: Literal["r", "c"]) -> NDArray[Any]:
    try:
        return map_array(verified(path), mode)
    except DamagedArtifact:
        raise
    except (ValueError, EOFError) as error:
        raise damaged(path, f"is no array: {error}") from None


@lru_cache(maxsize=MOST_MAPS)
def map_rows(path: str, below: int | None) -> NDArray[Any]:
    """An array of rows that is kept mapped; of labels it also knows what they must be below.

    Raises:
        DamagedArtifact: it is not what was written, or has labels out of range.
    """
    # Torch takes no read-only memory; with "c" the file is not changed either. Slicing a plain array is ten times as
    # fast as slicing a numpy.memmap.
    rows = np.asarray(_mapped(Path(path), "c"))
    if below is not None and len(rows):
        low, high = int(rows.min()), int(rows.max())
        if low < -1 or high >= below:
            raise damaged(Path(path), f"has labels from {low} to {high}, expected -1 to {below - 1}")
    return rows


def names_aside(name: str) -> Iterator[str]:
    """Names for the damaged folder of that name, the first choice first."""
    yield f"{name}.damaged"
    yield from (f"{name}.damaged-{number}" for number in count(2))


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder, which keeps all that is in it, in the bucket of its run as well; returns where it lies
    now."""
    names, bucket = names_aside(folder.name), bucket_of(folder)
    if bucket is not None:
        taken = bucket.names(bucket.name_of(folder.parent))
        free = (name for name in names if not any(f"/{name}/" in f"/{other}" for other in taken))
        names = iter([next(free)])
    aside = rename_to_free(folder, names)
    if bucket is not None:
        move(bucket, bucket.name_of(folder), bucket.name_of(aside), MANIFEST)
    forget()
    return aside
