"""Checkpoints of training: a folder that appears by one rename, and loads on any number of ranks.

    checkpoints/step-000000050/
      engine.safetensors              what every rank has alike, and the list of the other files, written by rank 0
      <name>.<first>-<end>.safetensors    rows of what is spread over the ranks, written by the rank that holds them
      checksums.json                  of all of these files, written last

The newest whole checkpoint is loaded; damaged ones are renamed to `.damaged-step-...` and named in the job's log.

Shapes: the first dimension of a shard's tensors is its rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grappa_dist.bucket import bucket_of, here, marked, refreshed_folder, send, withdraw
from grappa_dist.console import METRICS_FILE
from grappa_dist.distributed.collectives import failing_together
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import (
    Sum,
    make_folder,
    open_tensors,
    read_json,
    rename,
    save_tensors,
    sync,
    write_json,
)
from grappa_dist.training.deepspeed_engine import State

KEEP_CHECKPOINTS = 2
ENGINE_FILE = "engine.safetensors"
SUMS_FILE = "checksums.json"  # {"job": its folder, "files": {name: xxh3}}; checkpoints of earlier versions have none
_FILE_BYTES = 256 * 2**20  # of rows: serialising makes a copy of a file's tensors


@dataclass(frozen=True)
class RowShard:
    """One rank's rows [first, first + len) of tensors that all ranks hold together, in that rank's memory."""

    first: int
    tensors: Mapping[str, Tensor]

    @property
    def end(self) -> int:
        return self.first + len(next(iter(self.tensors.values())))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Rows of one file each, as [first, end)."""
        row_bytes = sum(t[:1].numel() * t.element_size() for t in self.tensors.values())
        step = max(1, _FILE_BYTES // max(row_bytes, 1))
        return ((start, min(start + step, self.end)) for start in range(self.first, self.end, step))


def save_checkpoint(
    context: RankContext,
    folder: Path,
    step: int,
    module: nn.Module,
    state: State,
    shards: Mapping[str, RowShard] | None = None,
) -> None:
    """Trainable parameters and optimizer state of `step` finished steps, and this rank's rows of `shards`.

    The checkpoint appears when all ranks have written their part; the oldest is then removed.
    """
    with CheckpointWriter(context, folder, background=False) as writer:
        writer.begin(step, module, state, shards)


class CheckpointWriter:
    """Writes the checkpoints of a job, one at a time: where tensors are on a GPU, beside the training that goes on.

    `begin` copies the state to pinned memory, behind what the GPU was given to do, and a thread writes it; `finish`
    makes the checkpoint appear. In between nothing of it is loaded. All ranks call both of them together.

    Args:
        background: whether a thread writes, from a copy; None: for a GPU. On a CPU, the thread and the copy would take
            cores and memory from training, whose steps take longer than a file does.
    """

    def __init__(self, context: RankContext, folder: Path, *, background: bool | None = None) -> None:
        self._context, self._folder = context, folder
        self._on_gpu = context.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1) if (self._on_gpu if background is None else background) else None
        self._buffers: dict[str, Tensor] = {}  # of the state, kept from one checkpoint to the next
        self._step: int | None = None  # of the checkpoint under way
        self._files: list[str] = []  # of all ranks' rows
        self._work = Future[dict[str, str]]()  # checksums of this rank's files

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        """Ends the thread; a checkpoint that was not finished never appears."""
        if self._thread is not None:
            self._thread.shutdown()

    @property
    def under_way(self) -> bool:
        return self._step is not None

    def written(self) -> bool:
        """Whether this rank has written its files, or failed to, so that `finish` does not wait for it."""
        return not self.under_way or self._work.done()

    def begin(self, step: int, module: nn.Module, state: State, shards: Mapping[str, RowShard] | None = None) -> None:
        """Begins to save what `save_checkpoint` saves; without a thread, finishes it."""
        assert not self.under_way
        comm, shards, (done, unfinished) = self._context.comm, shards or {}, self._paths(step)
        with failing_together(comm, self._context.device):
            own = bucket_of(self._folder) is not None  # then every machine has a folder of its own
            for left in done.parent.glob(".step-*") if comm.rank == 0 else ():  # by killed attempts
                shutil.rmtree(left, ignore_errors=True)
            if comm.rank == 0 or own:
                make_folder(unfinished)
        self._files = _file_names(self._context, shards)
        replicated = _replicated(module, state) if comm.rank == 0 else None
        metadata = {"step": str(step), "files": json.dumps(self._files)}
        self._step = step
        if self._thread is None:
            self._work = Future()
            try:
                self._work.set_result(_write_own(unfinished, shards, replicated, metadata))
            except Exception as error:
                self._work.set_exception(error)
            self.finish()
            return
        shards = {name: self._copied_rows(name, shard) for name, shard in shards.items()}
        if replicated is not None:
            replicated = {name: self._copied(name, tensor) for name, tensor in replicated.items()}
        copied = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self._work = self._thread.submit(_write_own, unfinished, shards, replicated, metadata, copied)

    def finish(self) -> None:
        """Makes the checkpoint under way appear, if there is one, once all ranks have written their files; removes the
        oldest. Raises what prevented files, on all ranks."""
        if self._step is None:
            return
        comm, (done, unfinished) = self._context.comm, self._paths(self._step)
        with failing_together(comm, self._context.device):
            own = self._work.result()
        sums = _sums_of_ranks(self._context, own, self._files)
        with failing_together(comm, self._context.device):
            if comm.rank == 0:
                self._publish(unfinished, done, sums)
        if bucket_of(self._folder) is not None:  # the part of another machine is in the bucket
            shutil.rmtree(unfinished, ignore_errors=True)
        self._step = None

    def _publish(self, unfinished: Path, done: Path, sums: Mapping[str, str]) -> None:
        write_json(unfinished / SUMS_FILE, {"job": self._folder.name, "files": sums})
        sync(unfinished)
        if bucket_of(done) is not None:  # what lies here is of an attempt before one on other machines
            shutil.rmtree(done, ignore_errors=True)
        rename(unfinished, done)
        sync(done.parent)
        if (self._folder / METRICS_FILE).exists():
            send(self._folder / METRICS_FILE)
        send(done / SUMS_FILE)  # last: the files of all ranks are there
        for old in _checkpoints(self._folder)[:-KEEP_CHECKPOINTS]:
            withdraw(old, SUMS_FILE)
            if old.exists():
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # a partly removed one is never whole

    def _paths(self, step: int) -> tuple[Path, Path]:
        """The folder of a checkpoint, and its name until it is whole."""
        done = self._folder / "checkpoints" / f"step-{step:09d}"
        return done, done.with_name(f".{done.name}.partial")

    def _copied_rows(self, name: str, shard: RowShard) -> RowShard:
        return RowShard(shard.first, {key: self._copied(f"{name}/{key}", t) for key, t in shard.tensors.items()})

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, filled behind what the GPU was given to do."""
        found = self._buffers.get(name)
        if found is None or found.shape != tensor.shape:
            found = torch.empty(tensor.shape, dtype=tensor.dtype)
            found = self._buffers[name] = found.pin_memory() if self._on_gpu else found
        return found.copy_(tensor.detach(), non_blocking=True)


def load_checkpoint(
    context: RankContext,
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    shards: Mapping[str, RowShard] | None = None,
) -> int:
    """Loads the newest whole checkpoint, if any, into module, optimizer and shards; returns its number of finished
    steps, 0 without one. All ranks call it together and load the same.

    Raises:
        RuntimeError: ranks see checkpoints of different steps.
    """
    found = _newest_whole(context, folder)
    if found is None:
        return 0
    path = here(found / ENGINE_FILE)
    with open_tensors(path, lambda: safe_open(path, framework="pt")) as file, torch.no_grad():
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        saved = sorted(file.keys())  # one order on all ranks: gathering a state sums it entry by entry
        for name, p in _trainable(module).items():
            p.copy_(file.get_tensor(name))
            state = {key.split("|")[1]: file.get_tensor(key) for key in saved if key.startswith(f"{name}|")}
            optimizer.state[p] = {k: v.to(p.device) if v.ndim or on_device else v for k, v in state.items()}
        metadata = file.metadata()
    for name, shard in (shards or {}).items():
        files = [file for file in json.loads(metadata["files"]) if file.startswith(f"{name}.")]
        _load_rows(found, files, name, shard)
    return int(metadata["step"])


def oldest_step(folder: Path) -> int:
    """The step of the oldest checkpoint that is kept, from which a restart may go on; 0 where there is none."""
    return min(map(step_of, _checkpoints(folder)), default=0)


def step_of(checkpoint: Path) -> int:
    """Finished steps of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _newest_whole(context: RankContext, folder: Path) -> Path | None:
    """The newest checkpoint that no rank finds damaged; the damaged ones are set aside."""
    comm, damaged = context.comm, set[str]()
    while True:
        found = [path for path in _checkpoints(folder) if path.name not in damaged]
        newest = found[-1] if found else None
        step = -1 if newest is None else step_of(newest)
        steps = {int(s) for s in comm.gather(torch.tensor([step], device=context.device))}
        if len(steps) > 1:  # a file system that shows files late; another attempt will see them
            raise RuntimeError(f"{folder}: ranks found checkpoints of different steps, {sorted(steps)}")
        if newest is None:
            return None
        if not context.set_aside_damaged(newest, _problem(newest, comm.rank, comm.size), "checkpoint"):
            return newest
        damaged.add(newest.name)


def _problem(checkpoint: Path, rank: int, size: int) -> str:
    """What is wrong with a checkpoint, "" if nothing is: every rank reads what all load, and a part of the rows."""
    try:
        refreshed_folder(checkpoint, SUMS_FILE)
        known = read_json(checkpoint / SUMS_FILE) if (checkpoint / SUMS_FILE).exists() else None
        if known and known["job"] != checkpoint.parent.parent.name:
            return f"it was written for {known['job']}"
        path = here(checkpoint / ENGINE_FILE)
        with open_tensors(path, partial(safe_open, path, framework="pt")) as file:
            metadata = file.metadata() or {}
        if not {"step", "files"} <= metadata.keys():
            return f"{ENGINE_FILE} was not written by this version of grappa_dist"
        if int(metadata["step"]) != step_of(checkpoint):
            return f"{ENGINE_FILE} is of step {metadata['step']}"
        for name in (ENGINE_FILE, *json.loads(metadata["files"])[rank::size]):
            open_tensors(here(checkpoint / name), partial(safe_open, checkpoint / name, framework="pt"))
            if known and (found := Sum.of(checkpoint / name).xxh3) != known["files"][name]:
                return f"{name} has the checksum {found}, {SUMS_FILE} says {known['files'][name]}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"a file is missing: {error}"
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _write_own(
    folder: Path,
    shards: Mapping[str, RowShard],
    replicated: Mapping[str, Tensor] | None,
    metadata: dict[str, str],
    copied: torch.cuda.Event | None = None,
) -> dict[str, str]:
    """Writes a rank's files of rows and, on rank 0, what all ranks have alike; the checksums by name.

    Args:
        copied: an event on the GPU after which the tensors are filled; None: they are.
    """
    if copied is not None:
        copied.synchronize()
    sums = dict[str, str]()
    for name, shard in shards.items():
        for first, end in shard.ranges():
            rows = {key: t[first - shard.first : end - shard.first].cpu() for key, t in shard.tensors.items()}
            file = _file_name(name, first, end)
            sums[file] = _write(folder / file, rows, {})
    if replicated is not None:
        sums[ENGINE_FILE] = _write(folder / ENGINE_FILE, {k: t.cpu() for k, t in replicated.items()}, metadata)
    bucket, done = bucket_of(folder), folder.with_name(folder.name.removeprefix(".").removesuffix(".partial"))
    if bucket is not None:
        for file in sums:
            bucket.put(folder / file, bucket.name_of(done / file))
    return sums


def _file_names(context: RankContext, shards: Mapping[str, RowShard]) -> list[str]:
    """The files of all ranks' rows."""
    names = []
    for name, shard in shards.items():
        ranges = torch.tensor(list(shard.ranges()), dtype=torch.int64, device=context.device).reshape(-1, 2)
        names += [_file_name(name, *both) for both in torch.cat(context.comm.gather(ranges)).tolist()]
    return names


def _sums_of_ranks(context: RankContext, own: Mapping[str, str], files: Sequence[str]) -> dict[str, str]:
    """The checksums of all ranks' files, by name."""
    places = {name: place for place, name in enumerate([*files, ENGINE_FILE])}
    rows = [[places[name], *(int(found[i : i + 8], 16) for i in range(0, 32, 8))] for name, found in own.items()]
    table = torch.tensor(rows, dtype=torch.int64, device=context.device).reshape(-1, 5)  # 32 bits each
    found = {place: parts for place, *parts in torch.cat(context.comm.gather(table)).tolist()}
    return {name: "".join(f"{part:08x}" for part in found[place]) for name, place in places.items()}


def _file_name(shard: str, first: int, end: int) -> str:
    return f"{shard}.{first:012d}-{end:012d}.safetensors"


@torch.no_grad()
def _load_rows(checkpoint: Path, files: Sequence[str], name: str, shard: RowShard) -> None:
    """Fills a rank's rows from the files that have them.

    Raises:
        ValueError: no file has some of the rows.
    """
    reached = shard.first
    for path in (checkpoint / file for file in sorted(files)):
        first, end = (int(number) for number in path.suffixes[-2].removeprefix(".").split("-"))
        low, high = max(first, reached), min(end, shard.end)
        if low != reached or low >= high or not here(path).exists():
            continue
        with open_tensors(path, partial(safe_open, path, framework="pt")) as file:
            for key, tensor in shard.tensors.items():
                tensor[low - shard.first : high - shard.first] = file.get_slice(key)[low - first : high - first]
        reached = high
    if reached < shard.end:
        raise ValueError(f"{checkpoint} has no row {reached} of {name}; remove it to go on from the one before")


def _replicated(module: nn.Module, state: State) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in _trainable(module).items()}
    for name, p in _trainable(module).items():
        tensors |= {f"{name}|{key}": v for key, v in state[p].items() if isinstance(v, Tensor)}
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Writes a file; its checksum, of the bytes as they can be read again."""
    save_tensors(path, tensors, metadata)
    return str(Sum.of(path).xxh3)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that appeared, by step; those of a run on an object store are the ones that its bucket has."""
    sent = marked(folder / "checkpoints", SUMS_FILE)
    if sent is not None:
        return [path for path in sent if path.match("step-*[0-9]")]
    return sorted((folder / "checkpoints").glob("step-*[0-9]"))


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
