"""An index of embeddings: built beside them by faiss, grown with them, opened whole, searched by cosine.

It lies in the folder `search` of a folder of embeddings. `index.json` names its files with their checksums, the
embeddings that it is of and their model, and is written last: what it does not name counts for nothing, and whoever
reads it sees one state, old or new. The files have names that are used once, and old ones are removed after it is
written; who has them open goes on with what they held.

A row has an id, of its shard's `first_id` and its position there, that stays while its shard is listed.
Shapes: n rows, q queries, D channels, k hits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from grappa_dist.console import Console, pluralize
from grappa_dist.export import LIST_FILE
from grappa_dist.extras import install_line, require
from grappa_dist.files import Sum, lock_file, make_folder, read_bytes, replace, write_json
from grappa_dist.output import printable_line
from grappa_dist.retrieval import faiss_index
from grappa_dist.retrieval.collection import Collection, Part, damaged, listed_parts, read_list
from grappa_dist.retrieval.faiss_index import Ids, Kind, NumberedRows
from grappa_dist.retrieval.nearest import Found, Rows, nearest
from grappa_dist.retrieval.opening import OpenModel, open_model
from grappa_dist.retrieval.tables import Shard, write_tables

FOLDER, INDEX_FILE, LOCK_FILE, FORMAT = "search", "index.json", "lock", 1
OPEN_TRIES = 5  # of an index that is replaced at that moment
_FILES = re.compile(r"index-[0-9a-f]{16}\.faiss|images-[0-9a-f]{16}\.parquet")  # that the list names
_OWN = re.compile(rf"{_FILES.pattern}|\.({_FILES.pattern}|index\.json)\..*")  # and what a killed build leaves of them


@dataclass(frozen=True)
class IndexedModel:
    """The model whose embeddings an index holds."""

    path: str  # where it lay
    variant: str
    sha256: str  # of its weights, and of its precision where that is not fp32
    gallery: str | None

    def describe(self) -> str:
        return f"{self.variant}{f', gallery {self.gallery}' if self.gallery else ''}, sha256 {self.sha256[:12]}"


@dataclass(frozen=True)
class SearchIndex:
    """An index that is open, of one state of its folder."""

    path: Path  # of its index.json
    model: IndexedModel
    kind: Kind
    collection: Collection
    ids: Ids = field(repr=False)  # of the rows of the collection, (n,), ascending
    faiss: Any = field(repr=False)  # None where it is not installed: then search is exact
    device: torch.device = field(default=torch.device("cpu"))  # of a search without it

    def nearest(self, queries: Rows, k: int) -> Found:
        """The k rows of the collection of the largest cosine with each query, best first; fewer where there are not k.

        May be called from several threads.

        Args:
            queries: (q, D) unit rows.

        Raises:
            ValueError: the queries have another number of channels.
        """
        dim = self.collection.rows[0].shape[1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries of shape {queries.shape}: expected (q, {dim}), as the index has {dim} channels")
        k = min(k, len(self.collection) - len(self.collection.bad))
        if self.faiss is None:
            return nearest(queries, self.collection.rows, self.collection.bad, k, self.device)
        cosines, ids = faiss_index.search(self.faiss, queries, k, self.kind.probes)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        if not np.array_equal(self.ids[rows], ids):
            raise damaged(self.path, "has rows that its list does not have")
        return Found(torch.from_numpy(cosines), torch.from_numpy(rows))

    def open_model(
        self, given: str | None = None, device: str = "auto", *, trust_modules: bool | None = None
    ) -> OpenModel:
        """The model that the embeddings are of, in their precision, for queries.

        Args:
            given: where it lies now, if that is elsewhere.
            trust_modules: as for `load_model`.

        Raises:
            ValueError: it is not there, or another one is.
        """
        place = self.model.path if given is None else given
        if given is None and not Path(place).is_dir():  # and nothing that names a module
            raise ValueError(
                f"{self.path}: its model ({self.model.describe()}) is no longer in {place}; name where it is by --model"
            )
        same: dict[str, Any] = {"device": device, "gallery": self.model.gallery, "trust_modules": trust_modules}
        model = open_model(place, **same)
        if model.sha256 != self.model.sha256 and Path(place).is_dir():  # embedded in another precision than the run's
            other = "fp32" if model.precision == "bf16" else "bf16"
            found = open_model(place, settings=[f"backbone.precision={other}"], **same)
            model = found if found.sha256 == self.model.sha256 else model
        if model.sha256 != self.model.sha256:
            raise ValueError(
                f"{self.path}: the index is of another model ({self.model.describe()}) than {model.describe()}; name "
                "that one by --model, or make the index anew with this one: grappa-dist embed --index"
            )
        return model


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def describe_exact() -> str:
    """What is said where faiss is not installed."""
    return f"faiss is not installed, so all rows are compared, exactly: {install_line('faiss')}"


def open_index(folder: Path | str, *, device: str | torch.device = "cpu") -> SearchIndex:
    """The index of a folder of embeddings, its files held against their checksums.

    Args:
        device: for an exact search, where faiss is not installed.

    Raises:
        ValueError: there is none, or a file of it is damaged, which is named; the message says what to do.
    """
    path = _path_in(Path(folder).expanduser())
    for left in reversed(range(OPEN_TRIES)):
        try:
            before = read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{folder}: there is no index; `grappa-dist embed --index` with --out {folder} makes one"
            ) from None
        try:
            return _opened(path, torch.device(device))
        except (ValueError, OSError):
            if not left or read_bytes(path) == before:
                raise  # else it was replaced meanwhile, and its old files were removed
    raise AssertionError("the last try returns or raises")


def _path_in(folder: Path) -> Path:
    """Of the list, for a folder of embeddings, or that of its index."""
    if folder.name == INDEX_FILE:
        return folder
    inside = folder / FOLDER / INDEX_FILE
    return folder / INDEX_FILE if folder.name == FOLDER and not inside.exists() else inside


def _opened(path: Path, device: torch.device) -> SearchIndex:
    listed = _read(path)
    parts = listed_parts(path, path.parent.parent, listed)
    try:
        ids = _ids_of(listed["shards"], parts)
        file = path.parent / listed["index"]["path"]
        if Sum.of(file).xxh3 != listed["index"]["xxh3"]:
            raise damaged(file, "does not hold what was written")
    except FileNotFoundError as error:
        raise damaged(Path(error.filename), "is missing") from None
    kind, model = Kind(**listed["kind"]), IndexedModel(**listed["model"])
    index = faiss_index.read(file, mapped=bool(kind.lists)) if has_faiss() else None
    collection = Collection(tuple(part for of in parts for part in of))
    if not len(collection):
        raise damaged(path, "lists no image")
    rows, dim = len(collection) - len(collection.bad), collection.rows[0].shape[1]
    if index is not None and (index.d, index.ntotal) != (dim, rows):
        raise damaged(file, f"has {index.ntotal} rows of {index.d} channels, expected {rows} of {dim}")
    return SearchIndex(path, model, kind, collection, ids, index, device)


def _read(path: Path) -> dict[str, Any]:
    listed = read_list(path)
    if listed.get("format") != FORMAT:
        raise ValueError(f"{path}: format {listed.get('format')!r}, this version reads {FORMAT}; make the index anew")
    try:
        _Listed.model_validate_json(json.dumps(listed))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"is no list of an index ({where}={first['input']!r:.80}: {first['msg']})") from None
    return listed


_Count = Annotated[int, Field(ge=0, lt=2**48)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Kind(_Strict):
    factory: str
    lists: _Count
    probes: _Count
    trained_for: _Count
    recall: FiniteFloat
    queries: _Count

    @model_validator(mode="after")
    def _has_so_many(self) -> Self:
        if (self.probes == 0) != (self.lists == 0) or self.probes > self.lists:
            raise ValueError(f"{self.probes} probes of {self.lists} lists")
        return self


class _Model(_Strict):
    path: str
    variant: str
    sha256: str
    gallery: str | None


class _File(_Strict):
    path: str = Field(pattern=f"^(?:{_FILES.pattern})$")  # beside the list, and no path out of the folder
    bytes: _Count
    xxh3: str


class _Table(_File):
    rows: _Count
    of: str


class _Shard(BaseModel):
    first_id: int  # further, `collection.read_list` checks it


class _Listed(BaseModel):
    """What an index's list is, which may be of anyone."""

    model_config = ConfigDict(strict=True)
    model: _Model
    kind: _Kind
    index: _File
    tables: list[_Table]
    shards: list[_Shard]
    images: _Count
    bad: _Count
    channels: _Count


def _ids_of(entries: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[Part]]) -> Ids:
    """The ids of the rows of all parts, in order."""
    of_parts = [
        int(entry["first_id"]) + part.first + np.arange(len(part.rows), dtype=np.int64)
        for entry, of in zip(entries, parts, strict=True)
        for part in of
    ]
    return np.concatenate([np.zeros(0, np.int64), *of_parts])


def build_index(folder: Path, model: Path, console: Console) -> Path:
    """Makes the index of a folder of embeddings, or brings it up to date; returns the path of its index.json.

    Rows of shards that were indexed before stay, those of new shards are added, those of images that are gone are taken
    out; all is made anew where the number of rows asks for another kind of index, or the old one is damaged. Memory:
    that of the index; the embeddings are mapped.

    Args:
        model: whose embeddings they are, by its folder.

    Raises:
        ValueError: no image could be read, or another process builds the index.
    """
    require("faiss", what="--index")
    make_folder(folder / FOLDER)
    try:
        lock = lock_file(folder / FOLDER / LOCK_FILE)
    except BlockingIOError as held:
        raise ValueError(f"{folder}: another process builds its index{held}; wait for it") from None
    with lock:
        listing = read_list(folder / LIST_FILE)
        return _Building(folder, model, listing, console).build()


@dataclass(frozen=True)
class _Building:
    folder: Path  # of the embeddings
    model: Path
    listing: Mapping[str, Any]  # of embeddings.json
    console: Console

    @property
    def path(self) -> Path:
        return self.folder / FOLDER / INDEX_FILE

    def build(self) -> Path:
        before = self._before()
        entries = _numbered(self.listing["shards"], before["shards"] if before else [])
        parts = listed_parts(self.folder / LIST_FILE, self.folder, {"shards": entries})
        collection = Collection(tuple(part for of in parts for part in of))
        if len(collection.bad) == len(collection):
            raise ValueError(
                f"{self.folder}: there is nothing to index: none of {len(collection)} images could be read"
            )
        rows = NumberedRows(collection.rows, _ids_of(entries, parts), np.array(sorted(collection.bad), np.int64))
        tables = before["tables"] if before else []
        listed = {
            "format": FORMAT,
            "model": self._about_model(),
            **{"images": len(rows.ids), "bad": len(rows.bad), "channels": rows.parts[0].shape[1]},
            **self._index(rows, before, is_same=before is not None and before["shards"] == entries),
            "tables": self._tables(list(zip(entries, parts, strict=True)), tables),
            "shards": entries,
        }
        if listed == before:
            self.console.log(f"index: as before, {pluralize(len(rows.ids), 'image')}")
        else:
            write_json(self.path, listed)
        self._remove_others(listed)
        return self.path

    def _tables(self, shards: list[Shard], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if importlib.util.find_spec("pyarrow") is None:
            self.console.log(f"no parquet is written: needs pyarrow: {install_line('pyarrow')}")
            return []
        return write_tables(self.path.parent, self.folder, shards, before)

    def _about_model(self) -> dict[str, Any]:
        listed = self.listing
        model, sha256, gallery = (listed.get(key) for key in ("model", "model_sha256", "gallery"))
        if not isinstance(model, str) or not isinstance(sha256, str):
            raise damaged(self.folder / LIST_FILE, "does not say which model its embeddings are of")
        return asdict(IndexedModel(str(self.model.resolve()), model, sha256, gallery))

    def _before(self) -> dict[str, Any] | None:
        """The list of the index that is there, if it is whole and of this model."""
        if not self.path.exists():
            return None
        try:
            listed = _read(self.path)
            file = self.path.parent / listed["index"]["path"]
            if Sum.of(file).xxh3 != listed["index"]["xxh3"]:
                raise damaged(file, "does not hold what was written")
        except (ValueError, OSError) as error:
            self.console.log(f"warning: the index is made anew: {printable_line(str(error))}")
            return None
        same = [listed["model"].get(key) == self._about_model()[key] for key in ("sha256", "gallery")]
        return listed if all(same) else None

    def _index(self, rows: NumberedRows, before: Mapping[str, Any] | None, *, is_same: bool) -> dict[str, Any]:
        """The kind of the index, and its file, which is written unless that of before is of the same rows."""
        if before is not None and is_same:
            return {key: before[key] for key in ("kind", "index")}
        count = len(rows.ids) - len(rows.bad)
        with self.console.stage("index", pluralize(count, "image")):
            kind = Kind(**before["kind"]) if before else Kind.of(count)
            kept = self.path.parent / before["index"]["path"] if before and kind.lists and kind.fits(count) else None
            kind = Kind.of(count) if kept is None else kind
            file = self.path.with_name(f"index-{os.urandom(8).hex()}.faiss")
            replace(file, lambda temporary: faiss_index.write(temporary, rows, kind, kept))
            if kind.lists:
                kind = faiss_index.measured(faiss_index.read(file, mapped=True), rows, kind)
        return {"kind": asdict(kind), "index": {"path": file.name, **asdict(Sum.of(file))}}

    def _remove_others(self, listed: Mapping[str, Any]) -> None:
        """Files of older states, and what a build that was killed has left."""
        named = {listed["index"]["path"], *(table["path"] for table in listed["tables"])}
        for file in self.path.parent.iterdir():
            if _OWN.fullmatch(file.name) and file.name not in named:
                with suppress(FileNotFoundError):
                    file.unlink()


def _numbered(shards: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a list with the first id of each: those that had one keep it and their order, others follow."""
    known = dict(zip(_keys_of(before), before, strict=True))
    following = max((entry["first_id"] + entry["images"] for entry in before), default=0)
    old, new = list[dict[str, Any]](), list[dict[str, Any]]()
    for key, entry in zip(_keys_of(shards), shards, strict=True):
        if key in known:
            old.append({**entry, "first_id": known[key]["first_id"]})
        else:
            new.append({**entry, "first_id": following})
            following += entry["images"]
    return [*sorted(old, key=lambda entry: entry["first_id"]), *new]


def _keys_of(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What tells a shard's rows from others; a shard that is listed twice has a number as well."""
    seen, keys = Counter[tuple[Any, ...]](), list[tuple[Any, ...]]()
    for entry in entries:
        key = (entry["rows"], entry.get("xxh3", {}).get("rows"), entry.get("source"), entry["images"])
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def describe_index(path: Path) -> str:
    """What is printed at the end of a build: where the index is, of how many images, what it finds; and its tables."""
    listed = _read(path)
    count = pluralize(listed["images"] - listed["bad"], "image")
    lines = [f"index       {path.parent}: {count}, {Kind(**listed['kind']).describe()}"]
    if listed["tables"]:
        lines.append(f"parquet     {path.parent}/images-*.parquet: {pluralize(len(listed['tables']), 'file')}")
    return "\n".join(lines)
